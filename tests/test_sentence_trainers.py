"""TrimCallback in the trainers of sentence-transformers, with their losses, labelled or not."""

import pytest
import torch

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as rerank
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder import losses as sparse
from transformers import TrainerCallback

from sensibert import SensibertError, TrimCallback, TrimConfig, TrimTrainer, layout_of
from sensibert.core.schedule import Schedule
from sensibert.models.wrapped import inner_batches
from sensibert.optim import MaskedAdamW, unwrapped
from tests.runs import sentences
from tests.sentence_models import CLASSES, outputs, sentence_folder, sentence_model

ROWS = sentences(48, seed=1)
PAIRS = {"anchor": [text for text, _ in ROWS], "positive": [text[::-1] + " good" for text, _ in ROWS]}
LABELS = [float(label) for _, label in ROWS]
TRAINERS = {
    "SentenceTransformer": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "CrossEncoder": (CrossEncoderTrainer, CrossEncoderTrainingArguments),
    "SparseEncoder": (SparseEncoderTrainer, SparseEncoderTrainingArguments),
}
LISTS = {"query": PAIRS["anchor"], "docs": [["good film", "dull film", text] for text in PAIRS["positive"]]}
KINDS = {  # class, columns, loss
    "pairs": ("SentenceTransformer", PAIRS, losses.MultipleNegativesRankingLoss),
    "cached": ("SentenceTransformer", PAIRS, lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=4)),
    "scores": ("SentenceTransformer", PAIRS | {"score": LABELS}, losses.CosineSimilarityLoss),
    "classes": (
        "SentenceTransformer",
        PAIRS | {"label": [label for _, label in ROWS]},
        lambda m: losses.SoftmaxLoss(m, 32, 2),
    ),
    "texts": (
        "SentenceTransformer",
        {"text": PAIRS["anchor"], "label": [label for _, label in ROWS]},
        losses.BatchAllTripletLoss,
    ),
    "splade": (
        "SparseEncoder",
        PAIRS,
        lambda m: sparse.SpladeLoss(m, sparse.SparseMultipleNegativesRankingLoss(m), 1e-3, 1e-3),
    ),
    "reranker": ("CrossEncoder", PAIRS | {"label": LABELS}, rerank.BinaryCrossEntropyLoss),
    "negatives": ("CrossEncoder", PAIRS, rerank.MultipleNegativesRankingLoss),
    "lists": ("CrossEncoder", LISTS | {"labels": [[1, 0, 0.5]] * 48}, rerank.LambdaLoss),
}


def trainer(model, columns, loss, folder, config, trainer_class=None, callbacks=(), evaluated=None, **changes):
    kind, usual = TRAINERS[type(model).__name__]
    options = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True}
    options |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | changes
    callback = config if isinstance(config, TrimCallback) else TrimCallback(config)
    several = isinstance(next(iter(columns.values())), Dataset)
    return (trainer_class or kind)(
        model,
        usual(str(folder), **options),
        train_dataset=columns if several else Dataset.from_dict(columns),
        eval_dataset=evaluated,
        loss=loss(model) if callable(loss) else loss,
        callbacks=[callback, *callbacks],
    )


@pytest.mark.parametrize("method", [None, "obs"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trims_and_the_saved_folder_reloads(kind, method, tmp_path):
    name, columns, loss = KINDS[kind]
    model = sentence_model(name, tmp_path)
    before = layout_of(model.transformers_model).encoder_params
    running = trainer(model, columns, loss, tmp_path / "run", TrimConfig("50%params", method=method))
    if method == "obs" and name != "CrossEncoder":
        message = f"'obs' draws labels from the classes of a head, and {name} has none; want method='layer-obs', which"
        with pytest.raises(SensibertError, match=message):
            running.train()
        assert layout_of(model.transformers_model).encoder_params == before
        return
    running.train()
    assert layout_of(model.transformers_model).encoder_params <= before / 2
    assert model.transformers_model.config.sensibert["method"] == ("obs" if name == "CrossEncoder" else "layer-obs")
    running.save_model(str(tmp_path / "small"))
    again = CLASSES[name](str(tmp_path / "small"), device="cpu")
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("kind", ["pairs", "reranker"])
@pytest.mark.parametrize("method, grid, other", [("taylor", "unit", "layer-obs"), ("saliency", "block8", "magnitude")])
def test_a_method_that_needs_the_loss_is_refused_at_the_start(kind, method, grid, other, tmp_path):
    name, columns, loss = KINDS[kind]
    running = trainer(
        sentence_model(name, tmp_path), columns, loss, tmp_path, TrimConfig("50%params", method=method, grid=grid)
    )
    message = f"'{method}' needs the loss, which is computed outside of the {name}; want method='{other}'"
    with pytest.raises(SensibertError, match=message):
        running.train()


def test_two_data_sets_with_other_columns_and_losses(tmp_path):
    model = sentence_model("SentenceTransformer", tmp_path)
    data = {
        "pairs": Dataset.from_dict(PAIRS),
        "scores": Dataset.from_dict({"a": PAIRS["anchor"], "b": PAIRS["positive"], "score": LABELS}),
    }
    loss = {"pairs": losses.MultipleNegativesRankingLoss(model), "scores": losses.CosineSimilarityLoss(model)}
    before = layout_of(model.transformers_model).encoder_params
    trainer(model, data, loss, tmp_path / "run", TrimConfig(method="layer-obs")).train()
    assert layout_of(model.transformers_model).encoder_params <= before / 2


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("kind", ["pairs", "reranker"])
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(kind, tmp_path):
    """The cuts are after steps 3 to 5."""
    name, columns, loss = KINDS[kind]
    method = "obs" if name == "CrossEncoder" else "layer-obs"
    config = TrimConfig("50%params", method=method, schedule=Schedule(shape="cubic"))
    resumable = type("Resumable", (TrimTrainer, TRAINERS[name][0]), {})

    def run(folder, callbacks=(), checkpoint=None, trainer_class=resumable):
        model = CLASSES[name](source, device="cpu")
        options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 2, "trainer_class": trainer_class}
        running = trainer(model, columns, loss, tmp_path / folder, config, callbacks=callbacks, **options)
        running.train(resume_from_checkpoint=checkpoint)
        return model.state_dict()

    source = sentence_folder(name, tmp_path)
    whole = run("whole")
    for step in (2, 6):
        run(f"stopped-{step}", [Stop(step)])
        checkpoint = str(tmp_path / f"stopped-{step}" / f"checkpoint-{step}")
        resumed = run(f"stopped-{step}", checkpoint=checkpoint)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole), step
    with pytest.raises(SensibertError, match="want TrimTrainer in place of Trainer .or a subclass of"):
        run("plain", checkpoint=checkpoint, trainer_class=TRAINERS[name][0])


def test_weights_of_a_loss_are_trained_in_a_subclass_of_trim_trainer(tmp_path):
    model = sentence_model("SentenceTransformer", tmp_path)
    loss = losses.SoftmaxLoss(model, 32, 2)
    before, resumable = (
        loss.classifier.weight.detach().clone(),
        type("R", (TrimTrainer, SentenceTransformerTrainer), {}),
    )
    config, columns = TrimConfig(method="layer-obs"), KINDS["classes"][1]
    running = trainer(model, columns, lambda model: loss, tmp_path / "run", config, trainer_class=resumable)
    running.train()
    assert not torch.equal(loss.classifier.weight, before) and isinstance(unwrapped(running.optimizer), MaskedAdamW)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = sentence_model("SentenceTransformer", tmp_path)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "max_steps": 8, "evaluated": Dataset.from_dict(PAIRS)}
    running = trainer(model, PAIRS, losses.MultipleNegativesRankingLoss, tmp_path / "run",
                      TrimConfig(method="layer-obs"), **options)  # fmt: skip
    running.train()
    best = CLASSES["SentenceTransformer"](running.state.best_model_checkpoint, device="cpu")
    assert torch.equal(outputs(best), outputs(model))


def test_choose_and_before_cut_get_what_they_need(tmp_path):
    from sensibert import allocate, analyze

    seen = {}

    def before_cut(model):
        seen["before"] = model
        return {"score": 1.0}

    def choose(model, batches, budget):
        seen["model"] = model
        return allocate(analyze(model, batches, "layer-obs"), budget)

    model = sentence_model("SentenceTransformer", tmp_path)
    callback = TrimCallback(TrimConfig(method="layer-obs"), before_cut=before_cut, choose=choose)
    trainer(model, PAIRS, losses.MultipleNegativesRankingLoss, tmp_path / "run", callback).train()
    assert seen == {"before": model, "model": model.transformers_model} and callback.memory.metrics_at_cut
    assert callback.excess(model) is None and callback.whole_plan(model)


def test_the_inputs_are_those_that_the_loss_runs_the_model_on(tmp_path):
    """Of the first step, row by row: the encoder's own inputs against those that the analysis would take."""
    for kind in ("pairs", "scores", "reranker", "lists"):
        name, columns, loss = KINDS[kind]
        model = sentence_model(name, tmp_path)
        running = trainer(model, columns, loss, tmp_path / "run", TrimConfig(method="layer-obs"))
        batch = next(iter(running.get_train_dataloader()))
        expected = {row for inputs in inner_batches(model, [batch]) for row in rows(inputs)}
        seen, inner = [], model.transformers_model
        forward = inner.forward  # called by the module around it: hooks would not run
        inner.forward = lambda seen=seen, forward=forward, **inputs: seen.append(inputs) or forward(**inputs)
        running.compute_loss(model, dict(batch))
        assert {row for inputs in seen for row in rows(inputs)} == expected, kind


def rows(inputs) -> list[tuple[int, ...]]:
    """The rows without padding."""
    masked = zip(inputs["input_ids"], inputs["attention_mask"].bool())
    return [tuple(ids[mask].tolist()) for ids, mask in masked]
