"""The training loop with a trainer that is no LiFT's: what it is asked, when, and what the loop makes of it."""

from __future__ import annotations

import csv
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lift_fast.tensor_files import weight_tensor
from lift_fast.training import loop
from lift_fast.training.data import GlobalBatches, Sample
from lift_fast.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Slope(Trainer):
    """Fits one number, in three terms, to items that depend on epoch and index."""

    name, part, files, terms = "the slope", "slope", ("slope.txt",), ("near", "far", "drift")

    def __init__(self, schedule, world, rate=0.1, calls=None):
        self.schedule, self.world, self.device, self.calls = schedule, world, torch.device("cpu"), calls
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batches, self.held_out = GlobalBatches(11, 3, seed=4), 2
        self.loader = DataLoader(self, batch_sampler=self.batches, collate_fn=self.collate, generator=torch.Generator())
        self.description = {"rate": rate}

    def __getitem__(self, key):
        return torch.tensor([1.0 + key[1] / 10 + key[0]])

    def collate(self, items):
        return Sample(torch.stack(items), ["item 3 is gone"] if len(self.calls) == 2 else [])

    def step(self, sample):
        near, far = (self.network(sample.pixels) - sample.pixels * 2).square().mean(0), sample.pixels.mean()[None]
        drift = torch.rand(1)
        near.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.calls.append("step")
        return torch.cat([near, far, drift]).detach()

    def state(self):
        return self.network.state_dict()

    def checked(self, state, source):
        return {"weight": weight_tensor(state["weight"], source, "weight")}

    def save(self, folder):
        self.calls.append("save")
        (folder / "slope.txt").write_text(str(self.network.weight.item()))

    def announcement(self, total):
        return f"a slope in {total} steps"

    def epoch_ended(self, epoch):
        self.calls.append(f"epoch {epoch}")
        return f"held out {epoch}.5"

    def figures(self):
        return {"slope": self.network.weight.item()}


def fit(out, calls=None, rate=0.1, resume=False, quiet=True, **changes):
    (out.parent / "items").mkdir(exist_ok=True)
    schedule = {"epochs": 2, "max_steps": None, "save_every_steps": None, "save_every_epochs": 1, "tensorboard": False}
    schedule = Schedule(out.parent / "items", out, **{**schedule, **changes})
    calls = [] if calls is None else calls
    return loop.run(partial(Slope, schedule, rate=rate, calls=calls), "cpu", resume=resume, quiet=quiet)


def test_what_a_trainer_is_asked_and_when(tmp_path, capsys):
    calls = []
    figures = fit(tmp_path / "out", calls, quiet=False)
    assert calls == [*["step"] * 3, "epoch 1", "save", *["step"] * 3, "epoch 2", "save"]
    said = capsys.readouterr().err
    assert "a slope in 6 steps" in said
    assert "; held out 1.5" in said
    assert "skipped: item 3 is gone" in said
    assert (figures["steps"], figures["pictures"], figures["held_out"], figures["parameters"]) == (6, 11, 2, 1)
    assert figures["slope"] == float((tmp_path / "out" / "slope.txt").read_text())
    assert figures["unreadable"] == ["item 3 is gone"]
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["step", "epoch", "loss", "loss_near", "loss_far", "loss_drift", "images_per_second", "unreadable"]
    assert [row[:2] for row in rows] == [[str(step), str(1 + step // 4)] for step in range(1, 7)]
    assert all(np.isclose(float(row[2]), sum(map(float, row[3:6])), rtol=1e-6) for row in rows)


@pytest.mark.parametrize("end", [2, 3, 5])
def test_a_resumed_run_is_the_same_run(tmp_path, end):
    torch.manual_seed(1)
    straight = fit(tmp_path / "straight")
    torch.manual_seed(1)
    fit(tmp_path / "parts", max_steps=end)
    torch.manual_seed(2)
    calls = []
    resumed = fit(tmp_path / "parts", calls, resume=True)
    assert resumed["resumed"] == end
    # An epoch that had ended is not evaluated again.
    assert [call for call in calls if call.startswith("epoch")] == [f"epoch {n}" for n in (1, 2) if end < 3 * n]
    assert (resumed["slope"], resumed["epoch_losses"]) == (straight["slope"], straight["epoch_losses"])
    logs = [[row[:6] for row in csv.reader((tmp_path / name / "log.csv").open())] for name in ("straight", "parts")]
    assert logs[0] == logs[1]


def test_the_state_is_the_trainers_own(tmp_path):
    out = tmp_path / "out"
    fit(out)
    with pytest.raises(FileExistsError, match=r"already contains last\.pth and slope\.txt"):
        fit(out)
    with pytest.raises(ValueError, match=r"trained with other options.*rate: saved 0\.1, now 0\.2"):
        fit(out, rate=0.2, resume=True)
    saved = torch.load(out / "last.pth", weights_only=True)
    torch.save({**saved, "slope": {"weight": torch.tensor([[torch.nan]])}}, out / "last.pth")
    with pytest.raises(ValueError, match=r"last\.pth, slope: 1 of 1 values of 'weight' are not finite"):
        fit(out, resume=True)
    saved["lift"] = saved.pop("slope")
    torch.save(saved, out / "last.pth")
    with pytest.raises(ValueError, match="not a valid training state: slope missing"):
        fit(out, resume=True)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="the slope's weights are no longer finite at step 1"):
        fit(tmp_path / "out", rate=float("inf"), max_steps=1)
    assert not (tmp_path / "out" / "last.pth").exists()
