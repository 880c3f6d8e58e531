"""Operation counts: the formulas against PyTorch's counter and against the paper's own figures."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from eval.efficiency.flops import DecoderShape, attention_flops, count_flops, linear_flops, paper_flops
from eval.efficiency.models import shape_config


def decoder(attention, heads=4, kv_heads=2, **fields):
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **fields,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_formulas_give_what_the_counter_counts(attention, kv_heads, rows):
    model, tokens = decoder(attention, kv_heads=kv_heads), 21
    ids = torch.randint(48, (rows, tokens))
    _, operators = count_flops(lambda: model(ids, logits_to_keep=1))
    shape = DecoderShape.of(model.config)
    analytic = rows * (linear_flops(shape, tokens) + attention_flops(shape, tokens, causal=False))
    # Older transformers make the rotary angles of the positions by a matrix product, newer ones elementwise.
    rotary = 2 * tokens * shape.head_dim // 2
    assert sum(operators.values()) - analytic in (0, rotary)


def test_the_weights_of_the_decoder_are_multiplied_once_for_each_token():
    model = decoder("sdpa")
    weights = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    shape = DecoderShape.of(model.config)
    assert linear_flops(shape, 8) - linear_flops(shape, 7) == 2 * weights


def test_a_causal_kernel_computes_the_pairs_that_the_mask_leaves():
    shape = DecoderShape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8, vocabulary=8)
    pairs = int(torch.ones(13, 13).tril().sum())
    assert attention_flops(shape, 13, causal=True) == 4 * 8 * pairs
    assert attention_flops(shape, 13, causal=False) == 4 * 8 * 13**2


def test_attention_on_the_cpu_is_counted_with_grouped_heads():
    query, key = torch.randn(2, 6, 11, 8), torch.randn(2, 3, 17, 8)
    with torch.no_grad():
        _, operators = count_flops(lambda: scaled_dot_product_attention(query, key, key, enable_gqa=True))
    assert sum(operators.values()) == 2 * 6 * 4 * 11 * 17 * 8


def test_equation_9_gives_table_5_of_the_paper():
    assert paper_flops(28, 3584, 18944, 32 * 196) == pytest.approx(41.42e12, rel=1e-4)
    table = {0.5: 18.6, 0.35: 13.4, 0.2: 7.6, 0.1: 4.0, 0.07: 2.9}
    for ratio, tera in table.items():
        assert paper_flops(28, 3584, 18944, round(ratio * 6272)) / 1e12 == pytest.approx(tera, abs=0.5)


def test_the_published_7b_shape_needs_twice_its_weights_for_each_token():
    shape = DecoderShape.of(shape_config("7b"))
    decoder_weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert linear_flops(shape, 1) == 2 * (decoder_weights + 3584 * 152064)
