"""Frames as a file: .mp4 (H.264, by PyAV), .gif or a .png strip (by Pillow). Written aside, then moved."""

from __future__ import annotations

import fractions
import pathlib
import tempfile

import numpy as np

from edgerun.errors import EdgerunError

SUFFIXES = (".mp4", ".gif", ".png")
_STRIP_FRAMES = 8  # of a .png
_QUALITY = "16"  # H.264's constant rate factor: no loss that is seen


def check_path(path: pathlib.Path) -> None:
    """Raise EdgerunError for a file that `write_clip` could not write, before the clip is made."""
    if path.suffix.lower() not in SUFFIXES:
        raise EdgerunError(f"{path} has the suffix {path.suffix!r}; a clip is written as {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise EdgerunError(f"cannot write {path}: folder {path.absolute().parent} does not exist; create it first")
    if path.is_dir():
        raise EdgerunError(f"cannot write {path}: it is a folder; give the clip a name of its own")
    try:
        import av  # noqa: F401
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise EdgerunError(f"writing a clip needs the package {error.name!r}: pip install 'edgerun[video]'") from None


def write_clip(frames: np.ndarray, fps: float, path: pathlib.Path) -> None:
    """Write frames uint8 [T, H, W, 3], T at least 1. Raises EdgerunError as `check_path`; OSError is passed on."""
    check_path(path)
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        part = pathlib.Path(folder) / path.name
        {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_strip}[path.suffix.lower()](frames, fps, part)
        part.replace(path)


def _write_mp4(frames: np.ndarray, fps: float, path: pathlib.Path) -> None:
    import av

    height, width = (size + size % 2 for size in frames.shape[1:3])  # H.264 halves its colours: sizes must be even
    padded = np.pad(frames, ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": _QUALITY}
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, fps: float, path: pathlib.Path) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    # A frame lasts whole hundredths of a second, so that some last longer than others and the clip as long as it is.
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]
    lasting = [10 * max(1, end - before) for before, end in zip([0, *ends], ends, strict=False)]
    first.save(path, save_all=True, append_images=rest, duration=lasting, loop=0)


def _write_strip(frames: np.ndarray, fps: float, path: pathlib.Path) -> None:
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int))
    Image.fromarray(np.concatenate(list(frames[chosen]), axis=1)).save(path)
