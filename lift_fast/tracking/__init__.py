"""Objects and points through a video: ``track("frames/", "first.png")``."""

from .frames import Frame, FrameError, Video, open_video
from .masks import ObjectMask, read_objects, write_mask
from .overlay import draw_overlay
from .points import PointTracks
from .tracker import TrackedFrame, Tracker, track

__all__ = [
    "Frame",
    "FrameError",
    "ObjectMask",
    "PointTracks",
    "TrackedFrame",
    "Tracker",
    "Video",
    "draw_overlay",
    "open_video",
    "read_objects",
    "track",
    "write_mask",
]
