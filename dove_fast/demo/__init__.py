"""`dove-fast demo`: a page that shows one picture, its tokens, and what the first few of them hold."""

from dove_fast.demo.gallery import Gallery, Reading, Reconstruction, UnknownPictureError
from dove_fast.demo.server import DemoServer

__all__ = ["DemoServer", "Gallery", "Reading", "Reconstruction", "UnknownPictureError"]
