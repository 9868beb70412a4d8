"""MindSpore Hub's own sequence on this repository; the rules of pages, each shown to refuse what breaks it."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import save_file

import localmim
from hub_sequence import SMALL_VIT, execute_conf, hub_load, read_header
from localmim import cli, hub
from localmim.config import Config, ModelConfig, TargetConfig, load_config
from localmim.convert.load import weights_of
from localmim.errors import UserError
from localmim.hub.__main__ import asset, main
from localmim.hub.page import check_page, check_text, with_asset
from localmim.mim import convmae
from localmim.models import registry
from localmim.models.classifier import Classifier
from localmim.training import build
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "hub").glob("*.md"))
VIT, SWIN = "localmim_vit_base_patch16_224", "localmim_swin_base_patch4_window7_224"
SMALL_SWIN = {
    "image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "decoder_dim": 16,
    "decoder_heads": 2,
}  # fmt: skip
LINK = "https://example.com/files/encoder.ckpt"


def run_file(path: Path, name: str, sizes: dict, quirks: bool = True, **target) -> str:
    """A weights file of a pre-training model with fresh weights, as a run leaves it."""
    config = Config(reference_quirks=quirks, model=ModelConfig(name, **sizes), target=TargetConfig(**target))
    ms.set_seed(3)
    save_file(weights_of(build_model(config)), path, weights_header(7, config.as_dict()))
    return str(path)


def copy_page(folder: Path, name: str) -> Path:
    """A page in a folder of its own."""
    return Path(shutil.copy(ROOT / "hub" / f"{name}.md", folder))


def copy_repository(folder: Path) -> Path:
    """What a hub user has of the repository, in the folder that repo-link names."""
    shutil.copytree(
        ROOT / "src", folder / "localmim" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(ROOT / "mindspore_hub_conf.py", folder / "localmim")
    return folder / "localmim"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the hub has it: page, checkpoint, repository; and the features of the run that it comes from."""
    folder = tmp_path_factory.mktemp("hub")
    page = copy_page(folder, VIT)
    copy_repository(folder)
    run = run_file(folder / "run.safetensors", VIT, SMALL_VIT)
    with pytest.MonkeyPatch.context() as patch:  # the page's network, small
        patch.setitem(hub.PAPER, VIT, {**hub.PAPER[VIT], **SMALL_VIT})
        command = ["asset", "--ckpt", run, "--page", str(page), "--link", LINK, "--out", str(folder)]
        assert cli.run(main, command) == 0
    return page


def images(side: int) -> Tensor:
    """[2, 3, side, side]."""
    return Tensor(np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32))


def test_the_hubs_own_sequence(published, monkeypatch):
    """Page, folder, conf file, network by the lower-cased name, checkpoint: nothing is missing, and it computes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    network, missing, unexpected = hub_load(published, **SMALL_VIT)
    assert (missing, unexpected) == ([], [])
    trained = build_model(Config(model=ModelConfig(VIT, **SMALL_VIT)))
    file = published.parent / "encoder.ckpt"
    entry = check_page(published)["asset"][0]
    assert entry["asset-sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    report = hub.load_strictly(trained, str(file), entry["asset-sha256"])
    assert sorted(report.matched) == sorted(p.name for p in trained.get_parameters())
    assert network.encoder.blocks[3].mlp.fc1.weight.asnumpy().std() > 0
    for name, value in weights_of(network).items():
        np.testing.assert_array_equal(value, weights_of(trained)[name], err_msg=name)
    assert Classifier(network.encoder, num_classes=10)(images(32)).shape == (2, 10)  # what the page promises


def test_a_fresh_process_among_decoys(published, tmp_path):
    """After a package `src`, a module localmim_other and an empty localmim, the copy beside the page is used."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text('NAME = "decoy"\n')
    (tmp_path / "localmim_other.py").write_text('raise AssertionError("nobody asked for this module")\n')
    script = ROOT / "tests" / "hub_sequence.py"
    environment = {**os.environ, "GLOG_v": "3"}
    done = subprocess.run(
        [sys.executable, str(script), str(published), str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=published.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    network = hub.create_network(VIT.upper(), **SMALL_VIT)
    hub.load_strictly(network, str(published.parent / "encoder.ckpt"))
    np.testing.assert_allclose(
        np.load(published.with_suffix(".npy")), network(images(32)).asnumpy(), rtol=1e-5, atol=1e-5
    )


def test_another_localmim_in_the_process(published, monkeypatch):
    """Only one package can have the name: a copy of the same version is used, a stranger is refused in one line."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = published.parent / "localmim"
    assert execute_conf(folder).create_network is hub.create_network
    monkeypatch.setattr(localmim, "__version__", "9.9")
    with pytest.raises(ImportError, match=r"localmim 9\.9 is loaded already from .*: load it in a process of its own"):
        execute_conf(folder)
    stranger = types.ModuleType("localmim")
    stranger.__file__ = "/elsewhere/localmim.py"
    monkeypatch.setitem(sys.modules, "localmim", stranger)
    with pytest.raises(ImportError, match="localmim of no version is loaded already from /elsewhere"):
        execute_conf(folder)


SMALL_CONVVIT = {
    "image_size": 32, "embed_dims": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2, "decoder_dim": 16,
    "decoder_heads": 2,
}  # fmt: skip
DECODERS = ("localmim", "mae", "greenmim", "convmae", "fastconvmae")


@pytest.mark.parametrize("name", localmim.list_models())
def test_every_registered_model(name):
    """create_network knows each name, in capitals too, and passes the arguments on."""
    sizes = dict(SMALL_CONVVIT if "convvit" in name else SMALL_SWIN if "swin" in name else SMALL_VIT)
    if not name.startswith(DECODERS):
        sizes = {k: v for k, v in sizes.items() if not k.startswith("decoder")}
    if name.startswith("lomar"):
        sizes["window"] = 2
    network = hub.create_network(name.upper(), **sizes)
    assert isinstance(network, nn.Cell)
    assert network.encoder.image_size == (sizes["image_size"],) * 2
    assert all(path == p.name for path, p in network.parameters_and_names())  # what load_param_into_net goes by


def test_wrong_calls():
    """A user's mistakes are one line each."""
    with pytest.raises(UserError, match="takes keyword arguments only, got 10"):
        hub.create_network(VIT, 10)
    with pytest.raises(UserError, match=f"did you mean '{VIT}'"):
        hub.create_network("LocalMIM_ViT_Base_patch16")
    with pytest.raises(UserError, match="unexpected keyword argument 'classes'"):
        hub.create_network(VIT, classes=10)


class Captured(Exception):
    """Carries the arguments of a call that is not made."""

    def __init__(self, name, **arguments):
        self.name, self.arguments = name, arguments


def capture(name, **arguments):
    """In the place of create_model."""
    raise Captured(name, **arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_network_is_the_papers(page, monkeypatch):
    """create_network's arguments and the model's own defaults are those of the recipe that the page names."""
    recipe = re.search(r"`(config/pretrain/\S+\.yaml)`", page.read_text(encoding="utf-8"))[1]
    config = load_config(["--config", str(ROOT / recipe)])
    name = read_header(page)["model-name"]
    assert config.model.name == name == page.stem
    factory = inspect.getclosurevars(registry._MODELS[name]).nonlocals["factory"]
    defaults = inspect.signature(convmae.convmae if factory is convmae.fastconvmae else factory).parameters
    for module in (build, hub):
        monkeypatch.setattr(module, "create_model", capture)
    with pytest.raises(Captured) as asked:
        build_model(config)
    with pytest.raises(Captured) as given:
        hub.create_network(name)
    assert given.value.arguments == hub.PAPER[name] and given.value.name == name
    for key, value in asked.value.arguments.items():
        assert hub.PAPER[name].get(key, defaults[key].default) == value, key


def test_load_strictly_refuses(published, tmp_path):
    """A renamed parameter, which the hub leaves untrained in silence; a cut, a missing and another file."""
    file = published.parent / "encoder.ckpt"
    values = ms.load_checkpoint(str(file))
    values["encoder.tokens"] = values.pop("encoder.cls_token")
    renamed = tmp_path / "renamed.ckpt"
    ms.save_checkpoint([{"name": n, "data": p} for n, p in values.items()], str(renamed))
    network = hub.create_network(VIT, **SMALL_VIT)
    before = weights_of(network)
    before = {n: a.copy() for n, a in before.items()}
    with pytest.raises(UserError, match=r"1 missing: encoder\.cls_token; 1 unexpected: encoder\.tokens"):
        hub.load_strictly(network, str(renamed))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read"):
        hub.load_strictly(network, str(cut))
    with pytest.raises(UserError, match="is not the file of the page: its SHA-256 is"):
        hub.load_strictly(network, str(cut), hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="does not exist"):
        hub.load_strictly(network, str(tmp_path / "none.ckpt"))
    for name, value in weights_of(network).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_asset_replaces_and_refuses(published, tmp_path, monkeypatch, capsys):
    """Another asset takes the place of the first; a run that is not the page's network leaves page and folder alone."""
    page = Path(shutil.copy(published, tmp_path))
    text = page.read_text(encoding="utf-8")
    run = str(published.parent / "run.safetensors")
    monkeypatch.setitem(hub.PAPER, VIT, {**hub.PAPER[VIT], **SMALL_VIT})

    def refused(message: str, *, ckpt: str = run, link: str = LINK) -> None:
        out = tmp_path / "refused"
        assert cli.run(main, ["asset", "--ckpt", ckpt, "--page", str(page), "--link", link, "--out", str(out)]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert page.read_text(encoding="utf-8") == text
        assert not out.exists() or not list(out.iterdir())

    refused("the page .* is of", ckpt=run_file(tmp_path / "swin.safetensors", SWIN, SMALL_SWIN))
    refused("do not fit the model", ckpt=run_file(tmp_path / "bins.safetensors", VIT, SMALL_VIT, nbins=18))
    heads = run_file(tmp_path / "heads.safetensors", VIT, {**SMALL_VIT, "num_heads": 4})
    refused(r"features differ by .*other arguments", ckpt=heads)
    refused("ends in .ckpt", link="https://example.com/encoder.mindir")
    refused("asset-link is", link="encoder.ckpt")
    refused("does not exist", ckpt=str(tmp_path / "none"))

    again = asset(run, str(page), "https://example.com/other/newer.ckpt", str(tmp_path))
    header = check_page(page)
    assert [item["asset-link"] for item in header["asset"]] == ["https://example.com/other/newer.ckpt"]
    assert page.read_text(encoding="utf-8").split("---")[2] == text.split("---")[2]
    assert {k: v for k, v in header.items() if k != "asset"} == {
        k: v for k, v in read_header(published).items() if k != "asset"
    }
    with pytest.raises(UserError, match="is there already"):
        asset(run, str(page), "https://example.com/other/newer.ckpt", str(again.parent))


def test_merging_order_of_a_swin_counts(tmp_path, monkeypatch, capsys):
    """Names and shapes fit, but trained without reference_quirks the page's network would compute something else."""
    monkeypatch.setitem(hub.PAPER, SWIN, {**hub.PAPER[SWIN], **SMALL_SWIN})
    page = copy_page(tmp_path, SWIN)
    sizes = {"nbins": 18, "bias": True}
    plain = run_file(tmp_path / "plain.safetensors", SWIN, SMALL_SWIN, quirks=False, **sizes)
    command = ["asset", "--page", str(page), "--link", LINK, "--out", str(tmp_path), "--ckpt"]
    assert cli.run(main, [*command, plain]) == 2
    assert "reference_quirks" in capsys.readouterr().err
    assert cli.run(main, [*command, run_file(tmp_path / "paper.safetensors", SWIN, SMALL_SWIN, **sizes)]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_obey_the_rules(page):
    """Ours do, with and without an asset; the hub would read from them what we do."""
    header = check_page(page)
    assert header == read_header(page)
    assert "asset" not in header and "accuracy" not in header  # nothing is trained or measured by us yet
    assert "asset" in check_text(with_asset(page.read_text(encoding="utf-8"), LINK, "0" * 64), page.name)


def test_the_pages_are_there():
    """One for each name with a published recipe."""
    assert [page.stem for page in PAGES] == sorted(hub.PAPER)


BREACHES = {
    "a third fence": (r"\Z", "\n---\n", "3 lines begin with ---"),
    "no end of the header": ("\n---\n", "\n", "1 lines begin with ---"),
    "not YAML, as in the page published before": ("fine-tunable: true", "accuracy: a: 84 / b: 84", "is not YAML"),
    "a key twice": ("license: ", "license: x\nlicense: ", "the key license stands twice"),
    "a key twice in an asset": ("    asset-link: ", "    asset-link: a\n    asset-link: ", "asset-link stands twice"),
    "no mapping": ("(?s)---\n.*?\n---", "---\njust words\n---", "not a mapping"),
    "no name": ("model-name: .*\n", "", "has no model-name"),
    "no repository": ("repo-link: .*", "repo-link:", "has no repo-link"),
    "an unknown model": ("model-name: .*", "model-name: LocalMIM", "LocalMIM is no registered model"),
    "a number for text": ("summary: .*", "summary: 1", "summary is 1, expected text"),
    "an unquoted version": ('version: "2.10"', "version: 2.10", "mindspore-version is the number 2.1"),
    "fine-tunable in words": ("fine-tunable: true", "fine-tunable: maybe", "fine-tunable is 'maybe'"),
    "an unknown module type": ("module-type: .*", "module-type: vision", "module-type is vision"),
    "two details": ("module-type: .*", "module-type: cv-a-b", "module-type is cv-a-b"),
    "an unknown use": ("used-for: .*", "used-for: inference/decoration", "used-for names 'decoration'"),
    "an unknown data set": ("license", "train-dataset: tiny_imagenet\nlicense", "train-dataset names 'tiny'"),
    "accuracy in words": ("license", "accuracy: high\nlicense", "accuracy is 'high'"),
    "accuracy as a truth": ("license", "accuracy: true\nlicense", "accuracy is True"),
    "a branch for a folder": ("/localmim/localmim", "/localmim/localmim/tree/main", "repo-link is"),
    "a slash at the end": ("/localmim/localmim", "/localmim/localmim/", "repo-link is"),
    "a colon": ("summary: .*", 'summary: "a: b"', "summary has a colon"),
    "a colon in our own key": ("license", 'note: "1:2"\nlicense', "note has a colon"),
    "no list of assets": ("(?s)asset:.*?---", "asset: none\n---", "asset is 'none', expected a list"),
    "an asset without a hash": ("    asset-sha256: .*\n", "", "an asset has no asset-sha256"),
    "an unquoted hash": ('asset-sha256: "0+"', "asset-sha256: " + "1" * 64, "asset-sha256 is 1111"),
    "a short hash": ('asset-sha256: "0+"', 'asset-sha256: "0f"', "asset-sha256 is '0f'"),
    "an unknown file format": ("file-format: ckpt", "file-format: pth", "file-format is pth"),
    "a file that the hub does not take": (r"encoder\.ckpt", "encoder.mindir", "asset-link is"),
    "no checkpoint": ("file-format: ckpt", "file-format: onnx", "0 assets are of file-format ckpt"),
    "two checkpoints": (
        "asset:\n",
        f'asset:\n  - file-format: ckpt\n    asset-link: {LINK}\n    asset-sha256: "{"0" * 64}"\n',
        "2 assets are of file-format ckpt",
    ),
    "a heading with a colon": ("## Usage", "## Usage:", "heading 'Usage:' ends with a colon"),
    "an underlined heading with a colon": ("## Usage", "Usage:\n===", "heading 'Usage:' ends with a colon"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_rule_can_be_broken(breach):
    """One line that names page and rule; the page without the breach is in order."""
    pattern, replacement, message = BREACHES[breach]
    text = with_asset((ROOT / "hub" / f"{VIT}.md").read_text(encoding="utf-8"), LINK, "0" * 64)
    check_text(text, "page.md")
    broken = re.sub(pattern, replacement, text, count=1)
    assert broken != text
    with pytest.raises(UserError) as raised:
        check_text(broken, "page.md")
    error = str(raised.value)
    assert error.startswith("page.md: ") and message in error and "\n" not in error


def test_the_check_command(tmp_path, capsys):
    """Exit code 0 for pages in order; 2 and one line for the first that is not, or cannot be read."""
    assert cli.run(main, ["check", *map(str, PAGES)]) == 0
    assert capsys.readouterr().out.count("without an asset: in order") == len(PAGES)
    page = copy_page(tmp_path, VIT)
    page.write_text(page.read_text(encoding="utf-8").replace("license", "licence"), encoding="utf-8")
    for path, message in ((page, "has no license"), (tmp_path / "none.md", "cannot read"), (ROOT / "LICENSE", ".md")):
        assert cli.run(main, ["check", str(PAGES[0]), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and message in error


def test_code_blocks_are_no_headings():
    """A comment in a code block may end with a colon."""
    text = (ROOT / "hub" / f"{VIT}.md").read_text(encoding="utf-8")
    check_text(text.replace("import mindspore_hub\n", "# a comment:\nimport mindspore_hub\n"), "page")
