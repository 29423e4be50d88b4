"""The faults that `mutants.py` plants: one changed line each, the tests that should see it, the reason if none does."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    "A fault: one line of a module, or of a stage's notebook, is another."
    stage: str    # that it spoils
    name: str     # what goes wrong
    file: str     # relative to the project
    old: str      # excerpt of one line, which the file has once
    new: str      # what stands there instead
    tests: tuple[str, ...]   # that should fail: pytest's names, or notebooks
    reason: str = ""         # why it may survive; empty for a mutant that has to be killed


CHECKS = "cvnb/audit/label_errors.py"
LABEL_ERRORS = ("tests/audit/test_label_errors.py",)
LEAKS = ("tests/audit/test_duplicates.py::test_leak_between_training_and_test_is_found_in_both_directions",)
USE = ("tests/export/test_image_use.py",)
SPLITS = tuple(f"tests/data/test_splits.py::{name}" for name in (
    "test_another_seed_gives_another_split_and_the_same_seed_the_same",
    "test_groups_copies_and_near_duplicates_stay_in_one_split",
    "test_image_of_a_group_in_the_given_test_split_is_not_trained_on",
    "test_validation_and_test_hold_each_distinct_image_once"))
KEYS = ("tests/pipeline/test_keys.py",)
PIXELS = ("tests/export/test_pixels.py",)
BUNDLE = ("tests/export/test_bundle.py",)
MARGIN = ("tests/metrics/test_paired.py::test_model_is_accepted_if_the_lower_end_lies_above_minus_the_margin",)
RUNTIMES = ("tests/export/test_runtimes.py",)
PREPROCESS = ("tests/models/test_weights.py::test_network_gets_red_first_minus_the_mean_over_the_deviation",)

_BOTH = ("LabelledImages(*(np.concatenate([getattr(images[s], part) for s in ('train', 'test')]) "
         "for part in ('images', 'targets')))")
_BY_BUNDLE = ("__import__('cvnb.data.images', fromlist=['x']).resize_images(__import__('torch').from_numpy("
              "__import__('cvnb.export.pixels', fromlist=['x']).decode_pixels(Path(root)/path, decoding)[0])[None], "
              "model.spec.image_size)[0].numpy()")
_WITHOUT_STATE = ("[{**s, 'state': {}} for s in c['optimizer_states']]")

MUTANTS: tuple[Mutant, ...] = (
    # audit
    Mutant("audit", "the threshold of label errors has the wrong sign", CHECKS,
           "1 - results.label_score[rows] >= threshold", "1 - results.label_score[rows] <= threshold", LABEL_ERRORS),
    Mutant("audit", "label errors suggest the given class", CHECKS,
           "results.loc[rows, \"suggested\"] = classes[posterior.argmax(axis=1)]",
           "results.loc[rows, \"suggested\"] = classes[given]", LABEL_ERRORS),
    Mutant("audit", "label errors name given and shown class the wrong way round", CHECKS,
           "the label says {given}, the image looks like {shown}",
           "the label says {shown}, the image looks like {given}", LABEL_ERRORS),
    Mutant("audit", "the precision of the label check is a share of all images", CHECKS,
           "expected = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)",
           "expected = np.cumsum(ranked) / len(ranked)", LABEL_ERRORS),
    Mutant("audit", "leaks ignore the test split", "cvnb/audit/duplicates.py",
           "rank = readable.split.map(SPLIT_RANK)", "rank = readable.split.replace('test', '').map(SPLIT_RANK)", LEAKS),
    Mutant("audit", "leaks are sought in one direction only", "cvnb/audit/duplicates.py",
           "links.append((files[pair.other], files[pair.path], pair.similarity, pair.kind))", "pass", LEAKS),
    # splits
    Mutant("splits", "images of one group are divided", "cvnb/data/splits.py",
           "    if \"group\" in table:", "    if False:", SPLITS),
    Mutant("splits", "near-duplicates are divided", "cvnb/data/splits.py",
           "elif \"near_duplicate_of\" in table:", "elif False:", SPLITS),
    Mutant("splits", "the seed is ignored", "cvnb/data/splits.py",
           "units[\"rank\"] = [digest([seed, u]) for u in units.unit]",
           "units[\"rank\"] = [digest([0, u]) for u in units.unit]", SPLITS),
    Mutant("splits", "copies of a test image stay in training", "cvnb/data/splits.py",
           "known = {unit: s for s in (\"val\", \"test\") for unit in units[split == s]}", "known = {}", SPLITS),
    Mutant("splits", "held-out copies count several times", "cvnb/data/splits.py",
           "return rows[rows.index.isin(first)].reset_index(drop=True)", "return rows.reset_index(drop=True)", SPLITS),
    Mutant("splits", "the temperature may be fitted on test images", "cvnb/data/splits.py",
           "\"temperature\": ImageRole(\"train, compress\", \"val\"",
           "\"temperature\": ImageRole(\"train, compress\", \"test\"",
           ("tests/export/test_image_use.py::test_nothing_is_chosen_on_test_images",)),
    Mutant("splits", "images of any split may have any role", "cvnb/data/splits.py",
           "if odd := sorted(set(rows.split) - {allowed.split}):", "if odd := []:",
           ("tests/export/test_image_use.py::test_images_of_another_split_or_number_are_not_recorded",)),
    # train
    Mutant("train", "test images are added to the rows of training", "cvnb/data/splits.py",
           "rows = {split: read_manifest(manifest, split) for split in SPLITS}",
           "rows = {split: read_manifest(manifest, None if split == 'train' else split) for split in SPLITS}", USE),
    Mutant("train", "test images are added to the arrays of training", "cvnb/training/loaders.py",
           "return SplitImages(audit[\"root\"], kind, classes, size, rows, images, notes, decoding)",
           f"return SplitImages(audit['root'], kind, classes, size, rows, images | dict(train={_BOTH}), "
           "notes, decoding)", USE),
    Mutant("train", "validation images are the test's", "cvnb/training/loaders.py",
           "images = {split: load_labelled(audit[\"root\"], rows[split], classes,",
           "images = {split: load_labelled(audit[\"root\"], rows[split.replace('val', 'test')], classes,", USE),
    Mutant("train", "rare classes weigh less", "cvnb/tasks/labels.py",
           "return (len(targets) / (len(classes) * counts)).astype(np.float32)",
           "return (len(classes) * counts / len(targets)).astype(np.float32)", ("tests/training/test_module.py",)),
    Mutant("train", "class weights are left out of the loss", "cvnb/training/module.py",
           "return self.task.loss(logits, targets, self.options.label_smoothing, weights)",
           "return self.task.loss(logits, targets, self.options.label_smoothing)", ("tests/training/test_module.py",)),
    Mutant("train", "label smoothing is left out", "cvnb/training/module.py",
           "return self.task.loss(logits, targets, self.options.label_smoothing, weights)",
           "return self.task.loss(logits, targets, 0.0, weights)", ("tests/training/test_module.py",)),
    Mutant("train", "the validation loss is smoothed", "cvnb/training/module.py",
           "return {\"val_loss\": float(self.task.loss(logits, targets)),",
           "return {\"val_loss\": float(self.task.loss(logits, targets, self.options.label_smoothing)),",
           ("tests/training/test_module.py",)),
    Mutant("train", "the best weights are those of the last epoch", "cvnb/training/callbacks.py",
           "better = value > self.value or np.isnan(self.value)", "better = True",
           ("tests/training/test_callbacks.py::test_keep_best_returns_the_weights_of_the_best_epoch",)),
    Mutant("train", "validation images are mirrored", "cvnb/training/module.py",
           "images = torch.tensor(self.data.images[i:i + self.batch_size])",
           "images = torch.tensor(self.data.images[i:i + self.batch_size]).flip(2)", USE),
    Mutant("train", "a resumed training has lost the optimizer's state", "cvnb/training/callbacks.py",
           "        trainer.save_checkpoint(part)",
           "        trainer.save_checkpoint(part); c = torch.load(part, weights_only=False); "
           f"c['optimizer_states'] = {_WITHOUT_STATE}; torch.save(c, part)",
           ("tests/training/test_checkpoints.py::"
            "test_killed_training_gives_the_same_result_as_without_interruption",)),
    Mutant("train", "figures of the test are those of validation", "cvnb/training/predict.py",
           "for split in \"val\", \"test\": metrics[f\"{name}_{split}\"] = measured[split][name]",
           "for split in \"val\", \"test\": metrics[f\"{name}_{split}\"] = measured[\"val\"][name]",
           ("tests/training/test_loaders.py::test_every_figure_counts_each_distinct_image_once",)),
    # metrics
    Mutant("metrics", "an interval has one side only", "cvnb/metrics/estimates.py",
           "np.minimum(center - half, limit(share * n))", "np.minimum(share, limit(share * n))",
           ("tests/metrics/test_estimates.py",)),
    Mutant("metrics", "the interval of a proportion has 90 %", "cvnb/metrics/estimates.py",
           "_NORMAL = float(special.ndtri(0.975))", "_NORMAL = float(special.ndtri(0.95))",
           ("tests/metrics/test_estimates.py",)),
    Mutant("metrics", "precision is divided by the true class", "cvnb/metrics/classification.py",
           "precision_high = _shares(hits, found, len(classes), groups)",
           "precision_high = _shares(hits, true, len(classes), groups)", ("tests/metrics/test_classification.py",)),
    Mutant("metrics", "F1 is divided by twice the true class", "cvnb/metrics/classification.py",
           "f1=safe_divide(2 * both, n + n_predicted)", "f1=safe_divide(2 * both, n + n)",
           ("tests/metrics/test_classification.py",)),
    Mutant("errors", "marked slices may be false in half of the cases", "cvnb/evaluate/errors.py",
           "FALSE_DISCOVERIES = 0.05 ", "FALSE_DISCOVERIES = 0.5 ",
           ("tests/metrics/test_coverage.py::test_slice_is_marked_below_five_percent_of_false_discoveries",)),
    Mutant("errors", "intervals of slices hold for one slice only", "cvnb/evaluate/errors.py",
           "low, high = simultaneous_proportions(share * effective, effective, len(masks))",
           "low, high = simultaneous_proportions(share * effective, effective, 1)",
           ("tests/metrics/test_coverage.py::test_intervals_of_slices_are_as_wide_as_their_number_asks_for",)),
    # compress
    Mutant("compress", "the margin has the wrong sign", "cvnb/metrics/paired.py",
           "only_new, n, low > -margin, level,", "only_new, n, low > margin, level,", MARGIN),
    Mutant("compress", "the point value accepts a model", "cvnb/metrics/paired.py",
           "only_new, n, low > -margin, level,", "only_new, n, found.value > -margin, level,", MARGIN),
    Mutant("compress", "a test is not written into the ledger", "cvnb/compress/acceptance.py",
           "record_test(stage.run, question, model, result.level, result.accepted, margin, result.n)", "pass",
           ("nbs/compress/05_acceptance.ipynb",)),
    Mutant("compress", "every test has the level of the first", "cvnb/compress/error_budget.py",
           "return ERROR_BUDGET * 2.0 ** -(len(tests) + 1) + recycled", "return ERROR_BUDGET / 2",
           ("tests/metrics/test_paired.py::test_twenty_tries_at_the_margin_stay_within_the_error_budget",)),
    Mutant("compress", "models are compared on different images", "cvnb/compress/acceptance.py",
           "if not len(both) == len(reference) == len(new):", "if not len(both):",
           ("nbs/compress/05_acceptance.ipynb",)),
    # export
    Mutant("export", "torch is fed from the bundle's decoding", "cvnb/export/parity.py",
           "images = load_images(root, paths, model.spec.image_size, decoding=decoding)",
           f"images = np.stack([{_BY_BUNDLE} for path in paths])", PIXELS),
    Mutant("export", "a difference of pixels is ignored", "cvnb/export/decoding_parity.py",
           "if not self.max_difference: return", "if self.max_difference < 256: return", PIXELS),
    Mutant("export", "the bundle is compared with itself", "cvnb/export/decoding_parity.py",
           "expected = np.asarray(open_image(Path(root)/path, decoding))",
           "expected = read_pixels(Path(root)/path, decoding)", PIXELS),
    Mutant("export", "the bundle ignores the orientation", "cvnb/export/pixels.py",
           "_turn_upright(_to_rgb(image), _read_orientation(image))", "_to_rgb(image)", PIXELS),
    Mutant("export", "the bundle ignores the scale", "cvnb/export/pixels.py",
           "if decoding.scale and is_deep(image):", "if False:", PIXELS),
    Mutant("export", "the tolerance of parity is ignored", "cvnb/export/parity.py",
           "if result.max_difference <= tolerance: return result", "if result.max_difference <= 1: return result",
           RUNTIMES),
    Mutant("export", "mean and standard deviation are swapped", "cvnb/models/vision_model.py",
           "return (x - self.mean) / self.std", "return (x - self.std) / self.mean", PREPROCESS),
    Mutant("export", "red and blue are swapped in the network's input", "cvnb/models/vision_model.py",
           "x = resize_images(images, self.size).permute(0, 3, 1, 2).float()",
           "x = resize_images(images, self.size).permute(0, 3, 1, 2).flip(1).float()", PREPROCESS),
    Mutant("export", "images are resized without antialiasing", "cvnb/data/images.py",
           "mode=\"bilinear\", antialias=True, align_corners=False)", "mode=\"bilinear\", align_corners=False)",
           ("tests/data/test_images.py::test_images_are_made_smaller_as_pillow_does_it",)),
    Mutant("export", "the graph has the labels in another order", "cvnb/export/onnx.py",
           "labels = json.dumps(spec.classes)", "labels = json.dumps(spec.classes[::-1])", RUNTIMES),
    Mutant("export", "bundle.json has the labels in another order", "cvnb/export/bundle.py",
           "return dict(task=spec.task, labels=spec.classes,", "return dict(task=spec.task, labels=spec.classes[::-1],",
           BUNDLE),
    Mutant("export", "INT8 is calibrated on validation images", "cvnb/export/quantize.py",
           "calibration = train.sample(min(n_calibration, len(train)), random_state=seed)",
           "calibration = val.sample(min(n_calibration, len(val)), random_state=seed)", USE),
    Mutant("export", "INT8 is calibrated on other images than the recorded ones", "cvnb/export/quantize.py",
           "return QuantizationData(load(calibration), load(validation), labels, calibration, validation)",
           "return QuantizationData(load(validation), load(validation), labels, calibration, validation)", USE),
    Mutant("export", "the digests of a bundle are not compared", "cvnb/export/bundle.py",
           "        if not whole: raise", "        if not file.is_file(): raise", BUNDLE),
    # benchmark
    Mutant("benchmark", "the ratio of speeds is inverted", "cvnb/benchmark/table.py",
           "speed_ratio(baseline.seconds, timings.seconds)", "speed_ratio(timings.seconds, baseline.seconds)",
           ("nbs/benchmark/03_table.ipynb",)),
    # runs
    Mutant("runs", "the key of a stage leaves out its inputs", "cvnb/core/stage.py",
           "return digest(dict(parts=parts, inputs=inputs))", "return digest(dict(parts=parts))", KEYS),
    Mutant("runs", "a changed input leaves a stage fresh", "cvnb/pipeline/freshness.py",
           "record[\"inputs\"] if record[\"inputs\"][name] != input_digest(run, name)]",
           "record[\"inputs\"] if False]", KEYS),
    Mutant("runs", "the key of a stage leaves out its parameters", "cvnb/pipeline/freshness.py",
           "return dict(code=digest([code_digest(c) for c in code]), functions=functions, params=plain,",
           "return dict(code=digest([code_digest(c) for c in code]), functions=functions, params={},", KEYS),
    Mutant("runs", "the key of a stage leaves out the lock", "cvnb/pipeline/freshness.py",
           "                lock=lock_digest(root))", "                lock=\"\")", KEYS),
    Mutant("runs", "the key of a stage leaves out cvnb's functions", "cvnb/pipeline/freshness.py",
           "functions |= reached_code(sources)", "functions |= {}", KEYS),
    # predict
    Mutant("predict", "an unreadable image ends with exit code 0", "cvnb/cli/runs.py",
           "    if unreadable: raise typer.Exit(1)", "    if unreadable: raise typer.Exit(0)",
           ("tests/cli/test_predict.py",)),
    Mutant("predict", "an unreadable image among others is no error", "cvnb/cli/runs.py",
           "    if unreadable and n > 1:", "    if unreadable and n > 10**9:",
           ("tests/cli/test_predict.py",)),
)
