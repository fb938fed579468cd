"""What passes and edits cost at the Stable Diffusion 1.5 shape, counted on meta tensors; floors on named GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from ddengine.backends.eager import EagerPasses
from ddengine.bench import roofline
from ddengine.bench.account import Account, edit_calls, total, unet_passes
from ddengine.bench.counting import Cost, Counter
from ddengine.bench.devices import DEVICES, Device, devices, named
from ddengine.bench.roofline import floor, floor_ms, report, share, text
from ddengine.bench.savings import Published, Structure
from ddengine.bench.shapes import sd15
from ddengine.cli import main
from ddengine.config import DirectDragConfig
from ddengine.directdrag.edit import edit
from ddengine.directdrag.prepare import prepare
from ddengine.errors import InputError
from ddengine.models.load import load_model

GIGA, TERA = 10**9, 10**12


@pytest.fixture(scope="module")
def account() -> Account:
    return Account(sd15(), (512, 512), DirectDragConfig.preset())


@pytest.fixture(scope="module")
def published(account: Account) -> Published:
    return Published(account, sd15())


@pytest.fixture(scope="module")
def facts(account: Account, published: Published) -> dict[str, Any]:
    return report(account, published, DEVICES, savings=True)


def near(found: float, expected: float, tolerance: float = 0.005) -> bool:
    return abs(found - expected) <= tolerance * expected


def test_a_forward_is_the_published_total_layer_by_layer(published: Published) -> None:
    """The anchors were computed from the list of layers, independently of any counter."""
    cost = published.forward()["published"]
    assert near(cost.arithmetic, 803.3 * GIGA) and cost.parameters == 859_520_964
    stages = {name: flops / GIGA for name, flops in cost.by("stage").items()}
    stages["down 3 and mid"] = stages.pop("down 3") + stages.pop("mid")
    expected = {"down 0": 109.6, "down 1": 68.4, "down 2": 63.8, "down 3 and mid": 19.7}
    expected |= {"up 0": 25.8, "up 1": 151.5, "up 2": 166.8, "up 3": 197.7}
    assert all(near(stages[name], flops) for name, flops in expected.items()), stages
    kinds = {name: flops / GIGA for name, flops in cost.by("kind").items()}
    assert kinds.pop("time") < 0.1 and kinds.keys() == {
        "3x3 convolution", "1x1 convolution", "feed-forward", "other linear", "self-attention", "cross-attention",
        "text keys and values",
    }  # fmt: skip
    expected = {"3x3 convolution": 400.3, "feed-forward": 153.5, "self-attention": 122.5, "other linear": 76.8}
    expected |= {"1x1 convolution": 43.6, "cross-attention": 3.6, "text keys and values": 2.95}
    assert all(near(kinds[name], flops, 0.02) for name, flops in expected.items()), kinds
    assert near(cost.weights, 1.72 * GIGA)


def test_a_step_lies_between_the_two_ways_to_count_attention(account: Account, published: Published) -> None:
    """1.73 TFLOP with a plain backward of attention (twice its forward), 1.79 with a fused one (2.5 times)."""
    forward, backward = published.forward()["published"], published.backward(frozen=True)
    assert near(forward.arithmetic + backward.arithmetic, 1.73 * TERA)
    assert near(forward.executed + backward.executed, 1.79 * TERA)
    attention = account.cost("predict").by("kind")["self-attention"]
    assert near(backward.recomputed, attention / 2, 0.1)
    # Every convolution and linear layer once more, where weights are not frozen.
    assert near(published.backward(frozen=False).arithmetic - backward.arithmetic, 681 * GIGA)


def test_torch_counts_the_same(account: Account) -> None:
    """torch's own counter over the same calls, with attention in its two products."""
    passes, latent = account.passes, account.latent
    leaf = latent.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        seen = passes.supervise(leaf * 1, 1, readout_hw=account.grid)
        torch.autograd.grad([seen.noise, seen.feature, *seen.appearance], leaf, [
            torch.empty_like(tensor) for tensor in (seen.noise, seen.feature, *seen.appearance)
        ])  # fmt: skip
    step = account.cost("supervise") + account.cost("backward")
    assert counter.get_total_flops() == step.arithmetic


def test_the_readout_before_and_after_the_resize(account: Account, published: Published) -> None:
    """Where the resize is products of matrices it counts as well, and is far less than what it saves."""
    assert near(published.readout(Structure()).arithmetic, 53.3 * GIGA)
    native = published.readout(Structure(native_readout=True, time_table=True))
    resize = native.by("kind").get("resize", 0)
    assert near(native.arithmetic - resize, 18.6 * GIGA) and resize < GIGA
    assert account.cost("supervise").by("stage")["readout"] == native.arithmetic


def test_more_work_is_seen() -> None:
    """A second product, a weight read twice, an attention: what the counter says of a layer known by heart."""
    with torch.device("meta"):
        linear, x = torch.nn.Linear(8, 16, dtype=torch.float16), torch.empty(4, 8, dtype=torch.float16)
    counter = Counter(unet=linear)
    once, twice = (counter.forward(lambda n=n: [linear(x) for _ in range(n)])[1] for n in (1, 2))
    assert once.arithmetic == 2 * 4 * 8 * 16 and twice.arithmetic == 2 * once.arithmetic
    assert once.weights == twice.weights == 2 * (8 * 16 + 16) and once.parameters == 8 * 16 + 16
    assert twice.handed == 2 * once.handed == 2 * 2 * 4 * 16
    assert once.traffic == 2 * (4 * 8 + 4 * 16)
    forward, backward = counter.both(linear, x.clone().requires_grad_(), wrt=[linear.weight])
    assert backward.arithmetic == 2 * forward.arithmetic == 2 * once.arithmetic
    q = torch.empty(1, 2, 32, 8, device="meta", requires_grad=True)
    forward, backward = counter.both(torch.nn.functional.scaled_dot_product_attention, q, q * 1, q * 1)
    assert forward.arithmetic == 2 * 2 * 2 * 32 * 32 * 8
    assert backward.arithmetic == 2 * forward.arithmetic and backward.executed == 2.5 * forward.arithmetic
    assert (once + once) == once * 2


def test_an_edit_stays_within_its_arithmetic(facts: dict[str, Any]) -> None:
    """210 updates at 512 x 512. The bounds are for UNet and readout head, as the published structure's 0.66 PFLOP are,
    and hold for what fused attention executes; the autoencoder comes to 1 % more. The totals are pinned."""
    edits = facts["edits"]
    networks = {name: found["without_autoencoder"] for name, found in edits.items()}
    supervise = next(call for call in edits["first"]["calls"] if call["call"] == "supervise")
    assert supervise["count"] == 217
    assert networks["first"]["flops_executed"] <= 0.48e15 and networks["next"]["flops_executed"] <= 0.42e15
    assert edits["first"]["flops"] <= 0.48e15 and edits["next"]["flops_executed"] <= 0.42e15  # autoencoder and all
    assert near(networks["published"]["flops"], 0.66e15)
    assert near(edits["first"]["flops"], 467.38e12) and near(edits["first"]["flops_executed"], 481.36e12)
    assert near(edits["next"]["flops"], 405.30e12) and near(edits["next"]["flops_executed"], 419.28e12)
    assert near(edits["published"]["flops"], 665.51e12)


def test_savings_lead_from_the_published_structure_to_this_engines(facts: dict[str, Any]) -> None:
    """The table ends exactly at what the engine's own passes cost, which are counted elsewhere."""
    rows = {row["name"]: row for row in facts["savings"]}
    last = facts["savings"][-1]
    for key in ("flops", "flops_executed"):
        assert last[key] == facts["edits"]["first"][key]
    assert rows["published"]["flops"] == facts["edits"]["published"]["flops"]
    assert rows["on_device"]["host_bytes"] == 0 and near(rows["published"]["host_bytes"], 48.2 * GIGA)
    removed = facts["folding"]["published"]["parameters"] - facts["folding"]["time_table"]["parameters"]
    # 16 cross-attentions' keys and values of 768 channels; the time's two layers and a projection for each resnet.
    cross = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    time = 320 * 1280 + 1280 + 1280 * 1280 + 1280 + 1281 * (5 * 320 + 5 * 640 + 12 * 1280)
    assert removed == cross + time


def test_what_the_scaler_skips_is_not_computed() -> None:
    """The published code's updates, of which a fresh gradient scaler skips 15 of 30 at a latent range of 8."""
    config = DirectDragConfig.preset("authors")
    found = unet_passes(edit_calls(config, 38, latent_range=8.0))
    assert found["drag"] == {"forward": 105, "backward": 105} and found["denoise"]["forward"] == 38


SHORT = {"n_inference_step": 8, "drag_end_step": 2, "track_per_step": 2, "max_drag_per_track": 2}
ENDLESS = {"reach": 0.0, "max_track_no_change": 1000}  # nothing arrives, nothing stands still for long enough


class Watched:
    """Passes that count their calls by the names that the account gives them."""

    def __init__(self, passes: EagerPasses) -> None:
        self.passes, self.calls = passes, dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.passes, name)
        if name not in ("predict", "reference", "supervise", "denoise"):
            return found

        def call(*args: Any, **options: Any) -> Any:
            known = name
            if name == "reference" and options.get("readout_hw"):
                known = "last inversion" if options.get("readout_times") is not None else "reference and readout"
            self.calls[known] = self.calls.get(known, 0) + 1
            return found(*args, **options)

        return call


@pytest.fixture(scope="module")
def embedded() -> EagerPasses:
    return EagerPasses(load_model("embedded", device="cpu", dtype="float32"))


@pytest.mark.parametrize(
    ("preset", "changes", "kv_budget"),
    [
        ("default", {}, None),
        ("default", {}, 1),  # bytes: too few for one step's keys and values
        ("default", {"mutual_attention": False}, None),
        ("paper", {"readout_guidance": False, "mutual_attention": False}, None),
        ("authors", {"amp_skip": 1}, None),
        ("authors", {"amp_skip": 9, "drag_end_step": 1}, 1),
        ("default", {"drag_end_step": 0}, 1),
    ],
)
def test_calls_are_those_of_a_real_edit(
    embedded: EagerPasses, preset: str, changes: dict[str, Any], kv_budget: int | None
) -> None:
    config = DirectDragConfig.preset(preset, **{**SHORT, **ENDLESS, **changes})
    passes, image = Watched(embedded), torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    ready = prepare(passes, image, config, kv_budget=kv_budget)  # type: ignore[arg-type]
    edited = edit(passes, ready, torch.tensor([[16.0, 12.0]]), torch.tensor([[16.0, 20.0]]), config)  # type: ignore[arg-type]
    guided = config.readout_guidance is not False
    calls = edit_calls(config, len(ready.times), guided=guided, kept=kv_budget is None)
    assert unet_passes(calls) == {**ready.passes, **edited.passes}
    found: dict[str, int] = {}
    for (_, call), count in calls.items():
        found[call] = found.get(call, 0) + count
    drag = found.setdefault("backward", 0)
    assert drag == sum(record.updated for record in edited.history)
    assert {
        name: count for name, count in found.items() if name not in ("encode", "decode", "backward")
    } == passes.calls
    again = edit_calls(config, len(ready.times), guided=guided, kept=kv_budget is None, prepared=True)
    assert unet_passes(again) == edited.passes


def test_a_floor_is_arithmetic_or_memory(account: Account) -> None:
    gpu = Device("a", tflops=100.0, bandwidth=2.0, source="")
    assert floor(Cost({("up 0", "time"): 3 * 10**11}, recomputed=10**11, weights=10**9), gpu).ms == 4.0
    assert floor(Cost({("up 0", "time"): 10**10}, weights=5 * 10**9, handed=10**9, traffic=10**12), gpu).ms == 3.0
    lines = account.edit(prepared=True)
    alone = sum(line.total.executed for line in lines) / DEVICES["h200"].tflops * 1e-9
    assert near(floor_ms(lines, DEVICES["h200"]), alone, 1e-9)  # arithmetic decides in every pass
    assert total(lines).memory / DEVICES["h200"].bandwidth * 1e-9 < alone
    assert share(2.0, 8.0) == 0.25
    with pytest.raises(InputError, match=r"floor is 2 ms; name the GPU"):
        share(2.0, 1.9)


def test_devices_are_found_by_name() -> None:
    assert list(devices(["H200", "4090"])) == ["h200", "4090"] and devices() == DEVICES and len(DEVICES) >= 5
    with pytest.raises(InputError, match=r"'h20'.*did you mean 'h200'.*a100"):
        devices(["h20"])
    with pytest.raises(InputError, match="one GPU, 2 are named"):
        devices(["h200", "a100"], measured=True)


# As nvidia-smi -L and torch.cuda.get_device_name print them.
KNOWN = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "A100-SXM4-80GB": "a100",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "4090",
    "GeForce RTX 3090": "3090",
    "NVIDIA GeForce RTX 3090": "3090",
    "NVIDIA GeForce RTX 5090": "5090",
}
UNKNOWN = """
    NVIDIA H200 NVL; NVIDIA H100 NVL; NVIDIA H100 PCIe; NVIDIA H100 80GB HBM2e; NVIDIA H100 64GB HBM2; NVIDIA H800;
    NVIDIA H20; NVIDIA GH200 480GB; NVIDIA GH200 120GB; NVIDIA H100 80GB HBM3 MIG 1g.10gb; NVIDIA H200 MIG 1g.18gb;
    NVIDIA A100-SXM4-40GB; A100-SXM4-40GB; NVIDIA A100-PCIE-40GB; NVIDIA A100 80GB PCIe; NVIDIA A100-SXM-64GB;
    NVIDIA A100-SXM4-80GB MIG 1g.10gb; NVIDIA A100-SXM4-80GB MIG 3g.40gb; NVIDIA A100X; NVIDIA A800-SXM4-80GB;
    GRID A100X-40C; NVIDIA A10; NVIDIA A10G; NVIDIA A30; NVIDIA A40; NVIDIA L40; NVIDIA L40G; NVIDIA L4-24Q;
    NVIDIA GeForce RTX 4090 D; NVIDIA GeForce RTX 4090 Laptop GPU; NVIDIA GeForce RTX 4080 SUPER;
    NVIDIA GeForce RTX 3090 Ti; NVIDIA GeForce RTX 3080 Ti Laptop GPU; NVIDIA GeForce RTX 5090 D;
    NVIDIA GeForce RTX 5090 D v2; NVIDIA GeForce RTX 5090 Laptop GPU; NVIDIA RTX 4000 Ada Generation; NVIDIA RTX A6000;
    NVIDIA B200; NVIDIA GB200; NVIDIA Graphics Device; Tesla T4; Tesla V100-SXM2-32GB; AMD Instinct MI300X; H100; 4090
"""


def test_drivers_names_are_known_to_the_letter() -> None:
    assert {name: named(name) for name in KNOWN} == {name: DEVICES[key] for name, key in KNOWN.items()}
    assert {DEVICES[key].name for key in KNOWN.values()} == {about.name for about in DEVICES.values()}
    others = [name.strip() for name in UNKNOWN.split(";")]
    assert len(others) == 46 and [name for name in others if named(name) is not None] == []


def test_the_command_refuses_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "Account", None)
    for options, words in ((["--gpu", "h20"], "h200"), (["--step-ms", "3"], "one GPU"), (["--size", "500"], "of 8")):
        done = CliRunner().invoke(main, ["bench", "limit", *options])
        assert done.exit_code == 2 and words in done.output


def test_the_command_answers(
    account: Account, published: Published, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "Account", lambda model, size_hw, config: account)
    monkeypatch.setattr(roofline, "Published", lambda account, model: published)
    done = CliRunner().invoke(main, ["bench", "limit", "--gpu", "H200", "--step-ms", "3.7", "--edit-ms", "972"])
    assert done.exit_code == 0, done.output
    assert "H200 SXM: 3.7 ms a drag step, 49.9 % of the limit" in done.output
    assert "H200 SXM: 972 ms a first edit, 50.0 % of the limit" in done.output
    done = CliRunner().invoke(main, ["bench", "limit", "--json"])
    found = json.loads(done.stdout)
    assert found["passes"] == facts["passes"] and set(found["gpus"]) == set(DEVICES) and "savings" not in found


def test_the_documents_numbers_are_these(facts: dict[str, Any]) -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")
    for table in text(facts).split("\n\n"):
        assert table in document, f"docs/limits.md lacks\n{table}"
