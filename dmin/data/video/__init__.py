"""Clips as examples: video files, animations, folders of frames."""

from dmin.data.video.folder import Clips, VideoFolder, saved

__all__ = ["Clips", "VideoFolder", "saved"]
