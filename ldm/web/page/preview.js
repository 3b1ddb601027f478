// The picture so far, from an address; the one before stays until the next is there.

const box = element.querySelector(".ldm-preview");

watch("value", () => {
  const address = props.value;
  if (!address) {
    box.replaceChildren();
    return;
  }
  const next = Object.assign(new Image(), { alt: "so far" });
  next.onload = () => {
    if (props.value) box.replaceChildren(next);
  };
  next.src = address;
});
