"""Models without a class of ours: transformers' own over our pages, or refused with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding import (
    GREEDY,
    Decoding,
    Tensors,
    assert_greedy,
    prompts,
    reference_model,
    restored,
    rewritten,
    tiny_runner,
)
from forebay_engine.hf_config import ModelError
from forebay_engine.models.hf_attention import UnfitAttention, _window
from forebay_engine.sequence import SamplingParams

Checkpoint = Callable[[str], Path]

FAMILIES = [
    "granite",
    "cohere2",
    "olmo2",
    "stablelm",
    "starcoder2",
    "gpt-neox",
    "gpt-bigcode",
    "smollm3",
    "glm4",
    "qwen2-moe",
    "gpt-oss",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_transformers(family: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(family)
    asked = prompts(5, 31)
    model = reference_model(folder, torch.float32)
    assert_greedy(model, asked, Decoding(tiny_runner(folder), asked, GREEDY).finish(24, chunk=7))


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "phi3", "opt-350m", "mixtral"])
def test_our_classes_equal_transformers_over_the_same_pages(
    family: str, tiny_checkpoint: Checkpoint
) -> None:
    every = SamplingParams(temperature=0.0, logprobs=384)
    found = []
    for impl in ("native", "transformers"):
        runner = tiny_runner(tiny_checkpoint(family), model_impl=impl)
        run = Decoding(runner, prompts(70), every)
        run.step({0: 31})
        drawn = dict(run.step({0: 39})[0].top)
        found.append(torch.tensor([drawn[token] for token in range(384)]))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("phi3", {}),  # longrope, beyond its original context
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    ],
)
def test_angles_do_not_depend_on_what_else_is_in_a_step(
    family: str, change: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Of itself transformers would rotate a short sequence as the longest beside it."""
    folder = rewritten(tiny_checkpoint(family), tmp_path / "changed", change)
    found = []
    for impl in ("native", "transformers"):
        runner = tiny_runner(folder, model_impl=impl, num_blocks=300, max_model_len=1024)
        found.append(Decoding(runner, prompts(5, 600), GREEDY).finish(6, chunk=300))
    assert found[0] == found[1]


def test_only_wanted_rows_have_logits_and_scale(tiny_checkpoint: Checkpoint) -> None:
    """Granite divides its logits, and that is done to what comes back from the hidden states."""
    folder = tiny_checkpoint("granite")
    (asked,) = prompts(12)
    run = Decoding(tiny_runner(folder), [asked], SamplingParams(temperature=0.0, logprobs=384))
    found = dict(run.step({0: 12})[0].top)
    logits = reference_model(folder, torch.float32)(torch.tensor([asked])).logits[0, -1]
    want = logits.log_softmax(-1)
    got = torch.tensor([found[token] for token in range(384)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_matrices_are_packed_and_rounded_as_ours(
    settings: dict[str, str], tiny_checkpoint: Checkpoint
) -> None:
    found = []
    for changed in ({}, settings):
        every = SamplingParams(temperature=0.0, logprobs=384)
        run = Decoding(tiny_runner(tiny_checkpoint("olmo2"), **changed), prompts(40), every)
        found.append(dict(run.step({0: 40})[0].top))
    exact, rounded = (torch.tensor([f[t] for t in range(384)]).exp() for f in found)
    assert 0 < float((exact - rounded).abs().sum()) < 0.25


def test_it_is_said_who_computes(
    tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        tiny_runner(tiny_checkpoint("olmo2"))
    assert "Olmo2ForCausalLM is run through transformers" in caplog.text


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mamba", "'MambaForCausalLM' .* keeps a state that is not attention's"),
        ("lfm2", "has layers of the kind conv"),
        ("bloom", "takes no positions"),
        ("falcon", "attention can't be replaced"),
        ("deepseek-v3", r"heads, keys and values \(4, 16, 16\), .* says \(2, 8, 8\)"),
    ],
)
def test_what_is_more_than_attention_is_refused(
    family: str, why: str, tiny_checkpoint: Checkpoint
) -> None:
    with pytest.raises(ModelError, match=f"{why}.*; serve it with a backend that knows it"):
        tiny_runner(tiny_checkpoint(family))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder with a"),
        ({"architectures": ["LlamaModel"]}, "to transformers it is no causal language model"),
        ({"architectures": ["Olmo2Model"], "model_type": "nothing"}, "model type `nothing`"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
            "it comes with code of its own, which is never run",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised checkpoints"),
        ({"layer_types": ["chunked_attention"] * 3}, "layers of the kind chunked_attention"),
    ],
)
def test_what_transformers_cannot_give_us_is_refused(
    change: dict[str, Any], why: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = rewritten(tiny_checkpoint("cohere2"), tmp_path / "changed", change)
    with pytest.raises(ModelError, match=f"(?s)config.json: architecture.*{why}"):
        tiny_runner(folder, model_impl="transformers")


Forward = Callable[..., Any]


def mixing(straight: Forward) -> Forward:
    return lambda self, x: straight(self, x.cumsum(1))


def twice(straight: Forward) -> Forward:
    return lambda self, *args, **said: (
        straight(self, *args, **said) and straight(self, *args, **said)
    )


def in_all_but_one(straight: Forward) -> Forward:
    def forward(self: Any, hidden_states: torch.Tensor, **said: Any) -> Any:
        if self.layer_idx == 1:
            return hidden_states, None
        return straight(self, hidden_states, **said)

    return forward


def with_a_bias(straight: Forward) -> Forward:
    return lambda self, *args, **said: straight(self, *args, bias=torch.ones(1), **said)


def to_both_sides(straight: Forward) -> Forward:
    def forward(self: Any, *args: Any, **said: Any) -> Any:
        self.is_causal = False
        return straight(self, *args, **said)

    return forward


def by_another_window(straight: Forward) -> Forward:
    def forward(self: Any, *args: Any, **said: Any) -> Any:
        return straight(self, *args, **{**said, "attention_mask": torch.tensor(8)})

    return forward


def of_few_tokens(straight: Forward) -> Forward:
    def forward(self: Any, *args: Any, **said: Any) -> Any:
        found = straight(self, *args, **said)
        found.logits = found.logits[..., :100]
        return found

    return forward


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("MLP", mixing, "its tokens see each other otherwise than through attention"),
        ("Attention", twice, "its layer 0 attends twice"),
        ("Attention", in_all_but_one, "of its 3 layers 2 use the interface"),
        ("Attention", with_a_bias, "its attention wants bias"),
        ("Attention", to_both_sides, "its layer 0 also sees later tokens"),
        ("Attention", by_another_window, "its layer 0 does not slide as its configuration says"),
        ("ForCausalLM", of_few_tokens, "its logits are not one for each token"),
    ],
)
def test_a_model_that_does_more_than_we_keep_is_noticed(
    part: str,
    change: Callable[[Forward], Forward],
    why: str,
    tiny_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohere: Any = import_module("transformers.models.cohere2.modeling_cohere2")
    changed = getattr(cohere, f"Cohere2{part}")
    monkeypatch.setattr(changed, "forward", change(changed.forward))
    with pytest.raises(ModelError, match=why):
        tiny_runner(tiny_checkpoint("cohere2"))


def test_masks_of_other_kinds_are_noticed() -> None:
    masks: Any = import_module("transformers.masking_utils")
    assert int(_window(mask_function=masks.causal_mask_function)) == 0
    assert int(_window(mask_function=masks.sliding_window_causal_mask_function(24))) == 24
    for function in (
        masks.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64)),
        masks.bidirectional_mask_function,
        masks.or_masks(masks.causal_mask_function, lambda b, h, q, kv: kv < q + 8),
    ):
        with pytest.raises(UnfitAttention, match="a mask of another kind"):
            _window(mask_function=function)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without(NORM), f"1 tensors are missing: {NORM}"),
        (lambda tensors: tensors | {"more": torch.ones(1)}, "1 tensors have no place: more"),
        (lambda tensors: tensors | {NORM: torch.ones(3)}, "1 tensors are not of .*q_norm.weight"),
    ],
)
def test_its_tensors_are_those_of_the_checkpoint(
    change: Callable[[Tensors], Tensors], why: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = restored(tiny_checkpoint("olmo2"), tmp_path / "changed", change)
    with pytest.raises(ModelError, match=f"(?s)changed: .*{why}"):
        tiny_runner(folder)


def test_model_impl_is_checked(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match=r"'Olmo2ForCausalLM' has no class .* GPT2LMHead"):
        tiny_runner(tiny_checkpoint("olmo2"), model_impl="native")
    with pytest.raises(ModelError, match="model_impl 'vllm' is not one of auto, native, transf"):
        tiny_runner(tiny_checkpoint("olmo2"), model_impl="vllm")


def test_a_head_is_tied_as_the_family_does_by_default(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Cohere ties, and there is no tensor for the head in its file."""
    folder = rewritten(tiny_checkpoint("cohere2"), tmp_path / "c", {}, ["tie_word_embeddings"])
    want = Decoding(tiny_runner(tiny_checkpoint("cohere2")), prompts(9), GREEDY).finish(6)
    assert Decoding(tiny_runner(folder), prompts(9), GREEDY).finish(6) == want
