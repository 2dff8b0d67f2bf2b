"""Bundles: what is written comes back; anything else is refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rows import random_row
from small_models import SMALL, risk_model, small_vocabulary, write_risk_bundle

from hymate.config import DataConfig, ObjectiveConfig
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.inference.bundle import FORMAT_VERSION, Bundle, build_model, read_bundle
from hymate.model.encoder import RiskModel
from hymate.model.pretrain_model import PretrainModel


def write(folder: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "vocabulary": small_vocabulary(),
        "data": DataConfig("somewhere", context=64, tokens_per_row=128, min_count=2),
        "card": "Some words.",
        "extra": {"auroc": 0.8},
    }
    write_risk_bundle(folder, **{**settings, **changes})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_read_back_predicts_the_same(bundle: Path) -> None:
    read = read_bundle(bundle)
    assert (read.kind, read.model, read.tasks, read.extra) == ("risk", SMALL, ["readmission"], {"auroc": 0.8})
    assert (read.data.context, read.data.tokens_per_row, read.data.min_count) == (64, 128, 2)
    assert read.vocabulary.codes == small_vocabulary().codes
    assert "Some words." in (bundle / "README.md").read_text()
    row = random_row((5, 9), vocab_size=read.vocabulary.size)
    torch.testing.assert_close(build_model(read)(row)["logit_AT"], risk_model()(row)["logit_AT"], rtol=0, atol=0)


def test_building_a_model_imports_nothing_of_what_compiles(bundle: Path) -> None:
    """PyTorch does for some operations without values: 0.4 s of every process that predicts."""
    code = (
        "import sys; from pathlib import Path; from hymate.inference.bundle import build_model, read_bundle\n"
        "build_model(read_bundle(Path(sys.argv[1])))\n"
        "assert not (found := sys.modules.keys() & {'sympy', 'torch._dynamo'}), found"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True)


def test_a_bundle_of_before_an_option_has_its_default(bundle: Path) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    for name in ("embedding", "causal"):
        del tree["model"][name]
    (bundle / "config.yaml").write_text(yaml.safe_dump(tree))
    assert read_bundle(bundle).model == SMALL


def test_a_run_folder_stands_for_its_bundle(bundle: Path) -> None:
    (bundle.parent / "config.yaml").write_text("run: {name: pretrain}\n")
    assert read_bundle(bundle.parent).tasks == ["readmission"]


def test_writing_again_replaces_the_bundle_and_leaves_nothing_beside_it(bundle: Path) -> None:
    write(bundle, extra={"auroc": 0.9})
    assert read_bundle(bundle).extra == {"auroc": 0.9}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_write_that_fails_keeps_the_bundle_that_was_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Vocabulary, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Vocabulary, "write", full)
    with pytest.raises(OSError, match="No space"):
        write(bundle, extra={"auroc": 0.9})
    monkeypatch.undo()
    assert read_bundle(bundle).extra == {"auroc": 0.8}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def edit(folder: Path, **changes: Any) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, **changes}))


def flip_a_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])


def lie_about_the_header(folder: Path) -> None:
    """A header that claims 2^60 bytes, with a checksum that agrees."""
    import hashlib

    data = (1 << 60).to_bytes(8, "little") + b"{}"
    (folder / "model.safetensors").write_bytes(data)
    sums = yaml.safe_load((folder / "config.yaml").read_text())["sha256"]
    edit(folder, sha256={**sums, "model.safetensors": hashlib.sha256(data).hexdigest()})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no vocabulary": (lambda folder: (folder / "vocabulary.parquet").unlink(), "vocabulary.parquet is missing"),
    "flipped byte in the weights": (lambda f: flip_a_byte(f, "model.safetensors"), "damaged"),
    "flipped byte in the vocabulary": (lambda f: flip_a_byte(f, "vocabulary.parquet"), "damaged"),
    "truncated weights": (truncate_weights, "damaged"),
    "absurd header": (lie_about_the_header, "damaged"),
    "newer format": (lambda folder: edit(folder, format_version=FORMAT_VERSION + 1), "update hymate"),
    "unknown kind": (lambda folder: edit(folder, kind="magic"), "unknown kind"),
    "not a bundle": (lambda folder: (folder / "config.yaml").write_text("a: 1"), "not a bundle"),
    "not YAML": (lambda folder: (folder / "config.yaml").write_text("a: [1"), "not a readable"),
    "not text": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "not a readable"),
    "a section missing": (lambda folder: edit(folder, model=None), "model is missing"),
    "a misspelt key": (lambda folder: edit(folder, model={"d_modle": 16}), "did you mean model.d_model"),
    "hostile YAML": (
        lambda folder: (folder / "config.yaml").write_text(
            "format_version: !!python/object/apply:os.system ['exit 1']"
        ),
        "not a readable",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(bundle: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(bundle)
    with pytest.raises(UserError, match=message) as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_the_wrong_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    state = PretrainModel(SMALL, ObjectiveConfig(), small_vocabulary().size).state_dict()
    write(tmp_path / "bundle", kind="pretrained", tasks=[], state=state)
    with pytest.raises(UserError, match="holds a pretrained model, but a risk model is needed"):
        read_bundle(tmp_path / "bundle", kind="risk")
    with pytest.raises(UserError, match="fine-tune it first"):
        build_model(read_bundle(tmp_path / "bundle"))


def test_weights_that_do_not_fit_the_configuration_are_refused_in_one_line(bundle: Path) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    edit(bundle, model={**tree["model"], "d_model": 32})
    with pytest.raises(UserError, match=r"do not fit its own config\.yaml") as caught:
        build_model(read_bundle(bundle))
    assert "\n" not in str(caught.value)


def several_heads() -> RiskModel:
    torch.manual_seed(0)
    tasks = ["readmission", "length_of_stay", "stay"]
    return RiskModel(SMALL, small_vocabulary().size, tasks, in_days=["length_of_stay"]).eval()


def test_a_bundle_of_several_tasks_gives_each_alone(bundle: Path) -> None:
    model = several_heads()
    write(bundle, tasks=list(model.heads), in_days=["length_of_stay"], state=model.state_dict())
    read = read_bundle(bundle)
    row = random_row((5, 9), vocab_size=read.vocabulary.size)
    logit_AT, log_days_AT = model.outputs(model.patient(row)[0])
    for number, task in enumerate(model.heads):
        alone = read.for_task(task)
        assert alone.tasks == [task] and alone.fingerprint == read.fingerprint
        said = build_model(alone)(row)
        torch.testing.assert_close(said["logit_AT"][:, 0], logit_AT[:, number], rtol=0, atol=0)
        torch.testing.assert_close(said["log_days_AT"][:, 0], log_days_AT[:, number], rtol=0, atol=0, equal_nan=True)
        assert said["log_days_AT"].isnan().all() == (task != "length_of_stay")
    with pytest.raises(UserError, match=r"^the bundle predicts readmission, length_of_stay, stay, not task=mortality$"):
        read.for_task("mortality")


def test_a_bundle_of_before_there_were_days_is_read(bundle: Path) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    del tree["in_days"]
    (bundle / "config.yaml").write_text(yaml.safe_dump(tree))
    assert read_bundle(bundle).in_days == [] and read_bundle(bundle).tasks == ["readmission"]


def test_a_value_may_stand_in_two_places(bundle: Path) -> None:
    interval = [0.7, 0.9]
    write(bundle, extra={"auroc": interval, "auprc": interval})
    assert read_bundle(bundle).extra == {"auroc": interval, "auprc": interval}


def test_settings_are_plain_values(bundle: Path) -> None:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    assert json.loads(json.dumps(tree)) == tree and "path" not in tree["data"]
    assert isinstance(read_bundle(bundle), Bundle)
