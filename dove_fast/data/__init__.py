"""Images in: listing the inputs, decoding them to RGB, the named transform, and loading ahead in threads."""

from dove_fast.data.decode import BACKGROUND, DecodedImage, DecodeError, decode_image
from dove_fast.data.listing import ImageInput, list_inputs
from dove_fast.data.load import Loaded, SetAside, load_image
from dove_fast.data.prefetch import prefetch
from dove_fast.data.transform import ShortSideCenterCrop

__all__ = [
    "BACKGROUND",
    "DecodeError",
    "DecodedImage",
    "ImageInput",
    "Loaded",
    "SetAside",
    "ShortSideCenterCrop",
    "decode_image",
    "list_inputs",
    "load_image",
    "prefetch",
]
