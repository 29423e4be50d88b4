"""Training goes by its objective: the weights that are kept, and the file of costs."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_helpers import NO_BATCHNORM, PLAIN, Recorder
from train_job import fresh

from cvnb.core.errors import UsageError
from cvnb.metrics.objective import Objective
from cvnb.training.fit import fit
from cvnb.training.module import TrainingModule
from cvnb.training.objective import cost_notes, read_costs


def planted_answers(monkeypatch: pytest.MonkeyPatch, data: tuple) -> None:
    "Nine in ten images are of one class: epoch 1 always names it, epoch 2 finds the others and mistakes some of it."
    targets = np.where(np.arange(len(data[1])) % 10 == 0, data[1].targets % 10, 0)
    rare = targets != 0
    mistaken = ~rare & (np.arange(len(targets)) % 4 == 1)
    epochs = [np.zeros_like(targets), np.where(mistaken, 1, targets)]

    def validation_step(self: TrainingModule, batch: tuple, number: int) -> None:
        n = len(batch[1])
        found = epochs[min(self.current_epoch, 1)][len(self.seen):len(self.seen) + n]
        self.seen += [0] * n
        self._outputs.append((5 * torch.eye(10)[found], torch.from_numpy(targets[len(self.seen) - n:len(self.seen)])))

    monkeypatch.setattr(TrainingModule, "validation_step", validation_step)
    monkeypatch.setattr(TrainingModule, "on_validation_epoch_start", lambda self: setattr(self, "seen", []))


@pytest.mark.parametrize("objective, best", [(None, 0), (Objective("accuracy", tuple("0123456789")), 0),
                                             (Objective("balanced", tuple("0123456789")), 1)])
def test_accuracy_and_balanced_accuracy_keep_different_epochs(data, tmp_path, monkeypatch, objective, best):
    planted_answers(monkeypatch, data)
    seen = []
    options = replace(PLAIN, keep="best", objective=objective, resolution=1.0)
    progress = Recorder()
    saved = monkeypatch.setattr("cvnb.training.callbacks.save_file", lambda w, p: (seen.append(w), save(w, p)))
    assert saved is None
    history = fit(fresh(NO_BATCHNORM), *data, options, tmp_path, progress=progress)
    assert len(seen) == 1 + best, "the first epoch is saved, and the second where it is better"
    assert history.val_accuracy[0] > history.val_accuracy[1]
    if best: assert history.val_balanced_accuracy[0] < history.val_balanced_accuracy[1]
    first = list(progress.curves[-1])[0]
    assert first == ("balanced_accuracy_val" if best else "accuracy_val"), "a sweep takes the first curve"


def save(weights: dict, path) -> None:
    from safetensors.torch import save_file
    save_file(weights, path)


@pytest.mark.parametrize("text, message", [
    ("scratch: {ok: 1}", "no class 'scratch' in the data"), ("defect: {okay: 1}", "no class 'okay' in the data"),
    ("defect: {ok: -1}", "the cost -1 is negative"), ("defect: {ok: .inf}", "is no finite number"),
    ("defect: {ok: true}", "is no finite number"), ("defect: 3", "defect should be a mapping"),
    ("[1]", "holds no costs"), ("{defect: {ok: 0}, ok: {defect: 0}}", "no error costs anything")])
def test_bad_costs_are_refused_with_file_and_place(tmp_path, text, message):
    (tmp_path/"costs.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as e: read_costs(tmp_path/"costs.yaml", ["defect", "ok"])
    assert "costs.yaml" in e.value.what


def test_costs_that_are_left_out_are_one_and_numbers_name_classes_too(tmp_path):
    (tmp_path/"costs.yaml").write_text("3: {8: 4.5}\n")
    assert read_costs(tmp_path/"costs.yaml", ["1", "3", "8"]) == ((0, 1, 1), (1, 0, 4.5), (1, 1, 0))
    with pytest.raises(UsageError, match="file of costs .* does not exist"): read_costs(tmp_path/"no.yaml", ["1"])
    (note,) = cost_notes(tmp_path/"costs.yaml", ["1", "3", "8"])
    assert note == ("costs.yaml names 1 of 6 kinds of errors; the others cost 1 (1 taken for 3, 1 taken for 8, "
                    "3 taken for 1, …)")
    (tmp_path/"whole.yaml").write_text("a: {b: 2}\nb: {a: 1, b: 0}\n")
    assert cost_notes(tmp_path/"whole.yaml", ["a", "b"]) == cost_notes("", ["a", "b"]) == []
