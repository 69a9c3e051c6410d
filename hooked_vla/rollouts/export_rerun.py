"""An episode for Rerun's viewer: images, states, actions and rewards on a time line of environment steps."""

from pathlib import Path
from typing import Any

from hooked_vla.extras import needs_packages
from hooked_vla.folders import write_file
from hooked_vla.rollouts.replay import Episode

with needs_packages(("rerun",), "Rerun's recordings need: pip install hooked-vla[export]"):
    import rerun as rr  # pyright: ignore[reportMissingImports]

APPLICATION = "hooked_vla"


def write_rerun(path: str | Path, episode: Episode, jpeg_quality: int = 90) -> Path:
    """Write an .rrd file, which appears when complete; `rerun FILE` shows it.

    Entities: camera/<name>, state/<i>, action/<i>, reward, success, and one for each of the episode's columns, numbers
    as scalars and texts as log; time lines: env_step, and time in seconds. jpeg_quality: 1..100.
    Raises ValueError for a quality outside its range, OSError when it cannot be written.
    """
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality is 1..100, got {jpeg_quality}")
    path = Path(path)
    recording = rr.RecordingStream(APPLICATION, recording_id=f"{path.stem}-{episode.number}")
    # in memory: Rerun's own writer of files waits for ever on a full disk
    kept = recording.memory_recording()
    about = dict(episode.about) | {"instruction": episode.instruction, "episode": episode.number}
    text = "\n".join(f"- {key}: {value}" for key, value in about.items())
    recording.log("about", rr.TextDocument(text, media_type=rr.MediaType.MARKDOWN), static=True)
    for step in range(len(episode) + 1):
        recording.set_time("env_step", sequence=step)
        recording.set_time("time", duration=step / episode.fps)
        _log_step(recording, episode, step, jpeg_quality)
    write_file(path, kept.drain_as_bytes())
    return path


def _log_step(recording: Any, episode: Episode, step: int, jpeg_quality: int) -> None:
    over = step == len(episode)
    for camera, images in episode.images.items():
        image = episode.last_images[camera] if over else images[step]
        recording.log(f"camera/{camera}", rr.Image(image).compress(jpeg_quality=jpeg_quality))
    vectors = {"state": episode.last_state if over else episode.states[step]}
    if not over:
        vectors["action"] = episode.actions[step]
        recording.log("reward", rr.Scalars(float(episode.rewards[step])))
        recording.log("success", rr.Scalars(float(episode.successes[step])))
        for name, values in episode.columns.items():
            value = values[step]
            shown = rr.TextLog(value) if isinstance(value, str) else rr.Scalars(float(value))
            recording.log(name, shown)
    for name, vector in vectors.items():
        for i, value in enumerate(vector):
            recording.log(f"{name}/{i}", rr.Scalars(float(value)))
