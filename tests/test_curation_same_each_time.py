"""An analysis gives the same each time: what is decided from it must not depend on which run made it."""

from video_cases import Track, noise, write

from avd_jax.curation import analysis


def test_a_video_is_decoded_in_one_thread(tmp_path, monkeypatch):
    """Between threads FFmpeg loses motion vectors, others each time: 10 of 132 pictures of a video of 720p."""
    path, threads, close = write(tmp_path / "a.mp4", Track(noise(20))), [], analysis.VideoFile.close

    def watched(file):
        if file._stream is not None:
            threads.append(file._stream.thread_type.name)
        close(file)

    monkeypatch.setattr(analysis.VideoFile, "close", watched)
    assert analysis.analyse(path, analysis.DEFAULTS)["error"] is None
    assert set(threads) == {"NONE"}


def test_the_motion_is_rounded(tmp_path):
    """OpenCV's mean differs in the 12th digit from call to call, by where in memory a picture lies."""
    path = write(tmp_path / "a.mp4", Track(noise(60)))
    (clip, *_) = analysis.analyse(path, analysis.DEFAULTS | {"frames": 17})["clips"]
    value = clip["scores"]["motion"]["value"]
    assert value == round(value, 4) > 0
