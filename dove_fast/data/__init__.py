"""Images in: listing and decoding them, the named transform, loading ahead, and data sets to train on."""

from dove_fast.data.decode import BACKGROUND, DecodedImage, DecodeError, decode_image
from dove_fast.data.decoders import Decoders
from dove_fast.data.folder import ImageFolder
from dove_fast.data.listing import ImageInput, list_inputs
from dove_fast.data.load import Loaded, Transform, load_image
from dove_fast.data.open_images import OpenImages
from dove_fast.data.prefetch import prefetch, read_ahead
from dove_fast.data.samples import JoinedSamples, Picture, Sample, Samples
from dove_fast.data.sources import EncodedImage, Source, SourceOptions, Unusable, open_source
from dove_fast.data.transform import ShortSideCenterCrop
from dove_fast.data.visual_genome import VisualGenome
from dove_fast.data.webdataset import WebDataset

__all__ = [
    "BACKGROUND",
    "DecodeError",
    "DecodedImage",
    "Decoders",
    "EncodedImage",
    "ImageFolder",
    "ImageInput",
    "JoinedSamples",
    "Loaded",
    "OpenImages",
    "Picture",
    "Sample",
    "Samples",
    "ShortSideCenterCrop",
    "Source",
    "SourceOptions",
    "Transform",
    "Unusable",
    "VisualGenome",
    "WebDataset",
    "decode_image",
    "list_inputs",
    "load_image",
    "open_source",
    "prefetch",
    "read_ahead",
]
