"""The published files of Stable Diffusion v1, by the SHA-256 of the whole file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFile:
    """version: "v1-4". weights: what the file holds: "ema", or "full" for both the raw weights and their average."""

    name: str
    version: str
    weights: str


KNOWN = {
    "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea": KnownFile("sd-v1-1.ckpt", "v1-1", "ema"),
    "efdeb5dc418a025d9a8cc0a8617e106c69044bc2925abecc8a254b2910d69829": KnownFile("sd-v1-1-full-ema.ckpt", "v1-1", "full"),
    "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d": KnownFile("sd-v1-2.ckpt", "v1-2", "ema"),
    "bc5086a904d7b9d13d2a7bccf38f089824755be7261c7399d92e555e1e9ac69a": KnownFile("sd-v1-2-full-ema.ckpt", "v1-2", "full"),
    "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f": KnownFile("sd-v1-3.ckpt", "v1-3", "ema"),
    "54632c6e8a36eecae65e36cb0595fab314e1a1545a65209f24fde221a8d4b2ca": KnownFile("sd-v1-3-full-ema.ckpt", "v1-3", "full"),
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": KnownFile("sd-v1-4.ckpt", "v1-4", "ema"),
    "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a": KnownFile("sd-v1-4-full-ema.ckpt", "v1-4", "full"),
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": KnownFile("v1-5-pruned-emaonly.ckpt", "v1-5", "ema"),
}
