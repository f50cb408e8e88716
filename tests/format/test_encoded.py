"""encode and decode: every byte against the oracle, by hand, and against the golden vectors; what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobcq_fx.format import (
    FormatSpec,
    absmax_row_scale,
    check_codebooks,
    decode,
    encode,
    scaled_entries,
    universal_codebooks,
)
from tests.format import oracle
from tests.format.cases import (
    ALL_SPECS,
    KINDS,
    PROPERTY,
    bits,
    codebooks_of,
    int8,
    matrix,
    same_bytes,
)


class TestAgainstTheOracle:
    @pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
    @pytest.mark.parametrize("columns", [1, 77, 128])
    def test_weight_rule(self, spec, columns):
        x = torch.from_numpy(matrix("heavy", 2, columns, seed=columns))
        same_bytes(x, spec, codebooks_of(columns, spec.num_codebooks))

    @pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
    def test_row_scales(self, spec):
        x = torch.from_numpy(matrix("normal", 3, 100, seed=5)) * torch.tensor([[1.0], [1e-6], [300.0]])
        same_bytes(x, spec, codebooks_of(7, spec.num_codebooks), absmax_row_scale(x))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rule", ["weight", "row", "static"])
    def test_kinds_of_data(self, kind, rule):
        x = torch.from_numpy(matrix(kind, 4, 135, seed=11))
        scale = {"weight": None, "row": absmax_row_scale(x), "static": torch.tensor(1.0)}[rule]
        same_bytes(x, FormatSpec(8, 32), codebooks_of(3, 8), scale)

    @pytest.mark.parametrize("static", [1e-38, 1e-5, 1.0, 3.0, 1e30, 2.0**-149])
    def test_static_scale_far_from_the_data(self, static):
        """Too small: scales saturate at 448 and the grid at +-2047. Too large: every scale is the smallest, 2**-9."""
        x = torch.from_numpy(matrix("heavy", 3, 64, seed=2))
        encoded = same_bytes(x, FormatSpec(16, 16), codebooks_of(9, 16), torch.tensor(static))
        if static in (1e-38, 1e30):
            assert set(encoded.scales.float().unique().tolist()) == {448.0 if static < 1 else 2.0**-9}

    @PROPERTY
    @given(
        spec=st.sampled_from(ALL_SPECS),
        kind=st.sampled_from(KINDS),
        rows=st.integers(0, 3),
        columns=st.integers(0, 150),
        rule=st.sampled_from(["weight", "row", 1.0, 0.02, 1e-30]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape_and_rule(self, spec, kind, rows, columns, rule, seed):
        x = torch.from_numpy(matrix(kind, rows, columns, seed))
        scale = {"weight": None, "row": absmax_row_scale(x)}.get(rule, rule)
        scale = torch.tensor(scale) if isinstance(scale, float) else scale
        same_bytes(x, spec, codebooks_of(seed % 1000, spec.num_codebooks), scale)

    @PROPERTY
    @given(
        values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24),
        codebooks=st.lists(
            st.lists(st.integers(-31, 31), min_size=16, max_size=16).map(sorted), min_size=2, max_size=2
        ),
        static=st.none() | st.floats(2.0**-140, 2.0**126, width=32),
    )
    def test_any_finite_float_and_any_codebooks(self, values, codebooks, static):
        x = torch.tensor([values], dtype=torch.float32)
        same_bytes(x, FormatSpec(2, 16), codebooks, None if static is None else torch.tensor(static))

    @PROPERTY
    @given(
        quarters=st.lists(st.integers(-4 * 32 * 31, 4 * 32 * 31), min_size=15, max_size=15),
        codebooks=st.lists(st.lists(st.integers(-6, 6), min_size=16, max_size=16).map(sorted), min_size=4, max_size=4),
    )
    def test_ties(self, quarters, codebooks):
        """Small codebooks tie often, in the entry and in the selector; quarters of a half step round both ways."""
        x = torch.tensor([[31.0] + [q / 128 for q in quarters]])
        same_bytes(x, FormatSpec(4, 16), codebooks, torch.tensor(1.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("rule", ["weight", "row"])
    def test_half_precision_is_converted_first(self, dtype, rule):
        x = torch.from_numpy(matrix("heavy", 3, 90, seed=4)).to(dtype)
        x[0, 0] = torch.finfo(dtype).max
        x[1] = torch.finfo(dtype).smallest_normal / 4  # a subnormal of that type
        scale = absmax_row_scale(x) if rule == "row" else None
        encoded = same_bytes(x, FormatSpec(8, 64), codebooks_of(1, 8), scale)
        widened = encode(x.float(), FormatSpec(8, 64), int8(codebooks_of(1, 8)), scale)
        assert torch.equal(encoded.codes, widened.codes)

    def test_views_encode_like_copies(self):
        base = torch.from_numpy(matrix("normal", 70, 40, seed=8))
        for view in (base.t(), base[::2, ::3], base[5:, 7:], base[:, :1].expand(70, 33)):
            same_bytes(view, FormatSpec(4, 16), codebooks_of(2, 4))

    def test_rows_are_independent_of_the_chunk_they_fall_in(self):
        """[600, 1024] takes several chunks; each row has the bytes it has alone."""
        x = torch.from_numpy(matrix("heavy", 600, 1024, seed=6))
        spec, codebooks = FormatSpec(8, 64), universal_codebooks(8)
        whole = encode(x, spec, codebooks, absmax_row_scale(x))
        for r in (0, 255, 256, 511, 512, 599):
            alone = encode(x[r : r + 1], spec, codebooks, absmax_row_scale(x[r : r + 1]))
            assert torch.equal(whole.codes[r], alone.codes[0])
            assert torch.equal(whole.selectors[r], alone.selectors[0])
            assert torch.equal(whole.scales[r].view(torch.uint8), alone.scales[0].view(torch.uint8))

    def test_one_row_longer_than_a_chunk(self):
        x = torch.from_numpy(matrix("normal", 2, (1 << 18) + 9, seed=6))
        spec, codebooks = FormatSpec(2, 128), codebooks_of(0, 2)
        encoded = encode(x, spec, int8(codebooks))
        tail = slice(-9, None)
        last = oracle.encode_row(x[1, tail].numpy(), 128, codebooks, np.float32(encoded.tensor_scale))
        assert encoded.codes[1, -64:].tolist() == oracle.pack_nibbles(last[0])
        assert encoded.scales[1, -1].view(torch.uint8).item() == last[2][0]


class TestRefusals:
    SPEC = FormatSpec(8, 64)

    @pytest.mark.parametrize("shape", [(), (64,), (2, 3, 64)])
    def test_not_a_matrix(self, shape):
        with pytest.raises(ValueError, match=r"x has shape \(.*\): pass \[R, K\], leading dimensions flattened"):
            encode(torch.zeros(shape), self.SPEC, universal_codebooks(8))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool])
    def test_dtype(self, dtype):
        with pytest.raises(ValueError, match=rf"x is {dtype}: pass fp32, bf16 or fp16"):
            encode(torch.zeros(2, 64, dtype=dtype), self.SPEC, universal_codebooks(8))

    @pytest.mark.parametrize("shape", [(1,), (2,), (2, 1), (1, 3), (3, 64)])
    def test_tensor_scale_shape(self, shape):
        with pytest.raises(ValueError, match=r"tensor_scale has shape \(.*\): pass a scalar or \[3, 1\]"):
            encode(torch.zeros(3, 64), self.SPEC, universal_codebooks(8), torch.ones(shape))

    @pytest.mark.parametrize("wrong", [torch.zeros(8, 16), torch.zeros(4, 16, dtype=torch.int8)])
    def test_codebooks_of_another_dtype_or_number(self, wrong):
        with pytest.raises(ValueError, match=r"codebooks are torch\.\w+ \[\d, 16\]: format 8x64 takes int8 \[8, 16\]"):
            encode(torch.zeros(3, 64), self.SPEC, wrong)

    def test_bytes_seen_before_in_another_dtype_or_shape(self):
        """Whatever encode remembers of a good codebook set, the check is of the tensor that it is given."""
        codebooks = universal_codebooks(8)
        encode(torch.ones(1, 64), self.SPEC, codebooks)
        for wrong in (codebooks.view(torch.uint8), codebooks.view(16, 8), codebooks.view(1, 8, 16)):
            with pytest.raises(ValueError, match="format 8x64 takes int8"):
                encode(torch.ones(1, 64), self.SPEC, wrong)

    def test_codebooks_of_another_length(self):
        with pytest.raises(ValueError, match=r"int8 \[8, 15\].*takes int8 \[8, 16\]"):
            check_codebooks(torch.zeros(8, 15, dtype=torch.int8), self.SPEC)

    @pytest.mark.parametrize("entry", [32, -32, 127, -128])
    def test_entry_out_of_range(self, entry):
        codebooks = universal_codebooks(8)
        codebooks[5, 15 if entry > 0 else 0] = entry
        with pytest.raises(ValueError, match=rf"codebook 5 has an entry outside \[-31, 31\]: .*{entry}"):
            check_codebooks(codebooks, self.SPEC)

    def test_not_sorted(self):
        codebooks = universal_codebooks(8)
        codebooks[3] = codebooks[3].flip(0)
        with pytest.raises(ValueError, match=r"codebook 3 is not sorted ascending: \["):
            check_codebooks(codebooks, self.SPEC)

    def test_repeated_entries_and_the_full_range_are_allowed(self):
        check_codebooks(int8([[-31] * 8 + [31] * 8]), FormatSpec(1, 16))


class TestEncoded:
    @pytest.mark.parametrize("spec", [FormatSpec(8, 64), FormatSpec(1, 16), FormatSpec(8, 16)], ids=lambda s: s.name)
    @pytest.mark.parametrize("shape", [(0, 64), (0, 5), (3, 0), (0, 0)])
    def test_empty(self, spec, shape):
        x = torch.zeros(shape)
        for scale in (None, torch.tensor(2.0), absmax_row_scale(x)):
            encoded = encode(x, spec, universal_codebooks(spec.num_codebooks), scale)
            assert encoded.shape == shape
            assert decode(encoded).shape == shape
            assert encoded.codes.shape == (shape[0], spec.code_bytes(shape[1]))
            assert encoded.tensor_scale.dtype == torch.float32
        assert encode(x, spec, universal_codebooks(spec.num_codebooks)).tensor_scale.item() == 1

    @pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda s: s.name)
    @pytest.mark.parametrize("columns", [1, 64, 200])
    def test_stored_tensors_are_what_the_spec_says(self, spec, columns):
        encoded = encode(torch.ones(3, columns), spec, universal_codebooks(spec.num_codebooks))
        padded = -(-columns // spec.array_size) * spec.array_size
        assert encoded.codes.shape == (3, padded // 2)
        assert encoded.codes.dtype == encoded.selectors.dtype == torch.uint8
        assert encoded.selectors.shape == (3, spec.selector_bytes(columns))
        assert encoded.scales.shape == (3, padded // spec.array_size)
        assert encoded.scales.dtype == torch.float8_e4m3fn
        assert encoded.tensor_scale.shape == ()
        assert 8 * encoded.nbytes == spec.stored_bits(3, columns)

    def test_row_scales_count_in_nbytes(self):
        x = torch.ones(3, 64)
        encoded = encode(x, FormatSpec(8, 64), universal_codebooks(8), absmax_row_scale(x))
        assert 8 * encoded.nbytes == FormatSpec(8, 64).stored_bits(3, 64, tensor_scales=3)

    def test_parameters_encode_without_a_graph(self):
        weight = torch.nn.Parameter(torch.from_numpy(matrix("normal", 4, 64, seed=0)))
        encoded = encode(weight, FormatSpec(8, 64), universal_codebooks(8))
        assert not decode(encoded).requires_grad
        assert torch.equal(decode(encoded), decode(encode(weight.detach(), FormatSpec(8, 64), universal_codebooks(8))))

    def test_the_input_is_not_changed(self):
        x = torch.from_numpy(matrix("normal", 4, 64, seed=0))
        before, scale = x.clone(), absmax_row_scale(x)
        x[1, 1] = before[1, 1] = float("nan")
        scale_before = scale.clone()
        encode(x, FormatSpec(8, 64), universal_codebooks(8), scale)
        assert bits(x.numpy()) == bits(before.numpy())
        assert torch.equal(scale, scale_before)

    def test_decoding_again_gives_the_same_values(self):
        """Encoding decoded values with the same scales is exact when the largest entry is in use: codes are stable."""
        spec, codebooks = FormatSpec(1, 16), [[-31, -20, *range(-6, 7), 31]]
        x = torch.from_numpy(matrix("ties", 4, 64, seed=3))
        once = decode(encode(x, spec, int8(codebooks), torch.tensor(1.0)))
        assert torch.equal(decode(encode(once, spec, int8(codebooks), torch.tensor(1.0))), once)

    def test_scaled_entries_are_exact_in_fp16(self):
        x = torch.from_numpy(matrix("mixed magnitudes", 16, 256, seed=3))
        values = scaled_entries(encode(x, FormatSpec(16, 16), int8(codebooks_of(4, 16)), absmax_row_scale(x)))
        assert torch.equal(values.half().float(), values)

    def test_rows_are_views(self):
        x = torch.from_numpy(matrix("normal", 6, 100, seed=0))
        for scale in (None, torch.tensor(1.0), absmax_row_scale(x)):
            encoded = encode(x, FormatSpec(8, 64), universal_codebooks(8), scale)
            part = encoded.rows(2, 5)
            assert part.shape == (3, 100)
            assert torch.equal(decode(part), decode(encoded)[2:5])
            assert part.codes.data_ptr() == encoded.codes[2].data_ptr()
