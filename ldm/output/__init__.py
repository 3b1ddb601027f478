"""What goes out with a picture: its receipt, and the file that holds both."""
