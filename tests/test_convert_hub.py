"""Weights on the Hugging Face Hub, against a stub of its protocol: what is downloaded, bad input, publishing."""

import pytest

constants = pytest.importorskip("huggingface_hub.constants")

from hub_server import COMMIT, Hub  # noqa: E402
from training_cases import DIT, make_config, write_weights  # noqa: E402

from avd_jax import convert  # noqa: E402
from avd_jax.convert import hub as ours  # noqa: E402
from avd_jax.convert.architectures import WAN_DIT  # noqa: E402
from avd_jax.convert.weights import open_weights  # noqa: E402
from avd_jax.errors import UserError  # noqa: E402
from avd_jax.methods.avd import RECIPE  # noqa: E402
from avd_jax.paths import hub_name, weights_path  # noqa: E402

NAME = "Wan-AI/Wan2.1-T2V-1.3B"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stub in place of the Hub, with Wan's repository, an empty cache and no token."""
    for name, value in (
        *(
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_TOKEN_PATH", str(tmp_path / "token")),
            ("HF_HUB_OFFLINE", False),
        ),
        *(("HF_HUB_DISABLE_XET", True), ("HF_HUB_DISABLE_PROGRESS_BARS", True)),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        folder = write_weights(tmp_path / "wan")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        others = (
            "Wan2.1_VAE.pth",
            "models_t5_umt5-xxl-enc-bf16.pth",
            "google/umt5-xxl/spiece.model",
            "assets/logo.png",
        )
        stub.files[NAME] = files | dict.fromkeys(others, b"large") | {"README.md": b"card", "examples/a.mp4": b"large"}
        forget()
        yield stub
        forget()


def forget():
    """As in a new process."""
    ours._snapshot.cache_clear()
    ours._commits.clear()


def test_names():
    assert hub_name(f"hf://{NAME}") == hub_name(f"hf:/{NAME}") == (NAME, None)
    assert hub_name("hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert [hub_name(path) for path in ("a/b", "gs://a/b", "/hf:/a/b")] == [None] * 3
    assert weights_path(f"hf://{NAME}@v1") == f"hf://{NAME}@v1"
    for wrong in ("hf://Wan2.1", "hf://a/b/c", "hf://", "hf://a/b@"):
        with pytest.raises(UserError, match=r"names no repository of weights; write hf://ORG/NAME"):
            hub_name(wrong)


def test_fields_of_weights_take_it_and_others_refuse_it(tmp_path):
    config = make_config(init_from=f"hf://{NAME}@v1", sample__vae=f"hf://{NAME}", data__latents="a")
    RECIPE.validate(config)
    for field, path, said in (
        ("data__latents", f"hf://{NAME}", "config.data.latents=.* hf:// is not supported"),
        ("init_from", "hf://Wan2.1", "config.init_from=.* names no repository of weights"),
    ):
        with pytest.raises(UserError, match=said):
            RECIPE.validate(make_config(**{"init_from": "a", "data__latents": "a", field: path}))


def test_only_what_is_needed_is_downloaded_and_only_once(server):
    assert convert.dit_config(f"hf://{NAME}") == DIT
    assert open_weights(f"hf://{NAME}", WAN_DIT).config == DIT
    taken = sorted(server.downloads())
    assert taken == sorted(name for name in server.files[NAME] if name.startswith(("config", "diffusion_pytorch")))
    with pytest.raises(UserError):  # the stub's is no tokenizer
        convert.load_tokenizer(f"hf://{NAME}")
    assert server.downloads()[len(taken) :] == ["google/umt5-xxl/spiece.model"]
    forget()
    folder = ours.fetched(f"hf://{NAME}@v1", "transformer")
    assert folder.name == COMMIT
    assert len(server.downloads()) == len(taken) + 1, "another run takes them from the cache"


def test_the_cache_serves_without_a_network(server, monkeypatch):
    folder = ours.fetched(f"hf://{NAME}", "transformer")
    forget()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert ours.fetched(f"hf://{NAME}", "transformer") == folder
    with pytest.raises(UserError, match=r"hf://other/one: is not in the cache, and http.*/other/one cannot be"):
        ours.fetched("hf://other/one", "vae")


def test_what_a_user_can_do_wrong(server, monkeypatch):
    server.files["gated/one"] = {"config.json": b"{}"}
    server.gated.add("gated/one")
    for path, said in (
        ("hf://nobody/nothing", "hf://nobody/nothing: there is no such repository; or it is private: log in with"),
        (f"hf://{NAME}@v9", rf"hf://{NAME}@v9: has no revision 'v9'; see http.*/commits/main"),
        ("hf://gated/one", r"hf://gated/one: is gated; accept its terms on http.*gated/one, and log in"),
        ("hf://a/b--c", r"hf://a/b--c: is no name of a repository"),
    ):
        with pytest.raises(UserError, match=said) as error:
            open_weights(path, WAN_DIT)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'hf://a/b: needs another package; pip install -e "\.\[hub\]"'):
        open_weights("hf://a/b", WAN_DIT)


def test_an_export_is_published_with_its_card(server, tmp_path, monkeypatch):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("the card")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf://me/student: no right to write to it .* log in with `hf auth login`"):
        ours.push(folder, "hf://me/student")
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    assert ours.push(folder, "hf://me/student") == f"{server.url}/me/student"
    assert server.pushed["me/student"] == {"README.md": b"the card", "config.json": b"{}", "": "main"}


@pytest.mark.parametrize(
    ("folder", "target", "said"),
    [
        ("student", "me/student", "--push=me/student: write hf://ORG/NAME"),
        ("gs://bucket/student", "hf://me/student", "gs://bucket/student is in a bucket; give a local --dst"),
    ],
)
def test_what_cannot_be_published_is_known_before_it_is_exported(folder, target, said):
    with pytest.raises(UserError, match=said):
        ours.check_push(folder, target)
    ours.check_push("student", "hf://me/student@main")
