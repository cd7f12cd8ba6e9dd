"""One row an operator: what it means, and all that is known of it by name.

What a list of operator names would say is a query of this table: :func:`has`, or a column of :func:`operator`.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import STANDARD
from liar_opt.frontend.rules import (
    aten,
    meaning,
    numbers,
    onnx_attention,
    onnx_convolutions,
    onnx_fused,
    onnx_generators,
    onnx_layout,
    onnx_lookups,
    onnx_normalisation,
    onnx_places,
    onnx_pointwise,
    onnx_products,
    onnx_recurrent,
    onnx_reductions,
)
from liar_opt.frontend.rules.table import ATEN, MICROSOFT, Op, Trait, each, table_of

MOVERS = Trait.KEEPS_ORDER | Trait.REPEATS | Trait.TURNS
"""Operators that give a tensor another shape or type and leave its values alone."""
COPYING = Trait.KEEPS_ORDER | Trait.COPIES | Trait.UNARY
POINTWISE = Trait.UNARY | Trait.BROADCASTS
"""Operators that compute element by element."""

DRAWN = "what is drawn differs from run to run, and no result can be compared"
GPU = "no kernel on the CPU"
ANY = "what it holds is anything, and no result can be compared"
IDLE = "torch.export leaves it out of a module in evaluation mode"
OLDER = "older releases of torch.export write it"
NEW = "newer than the operators that ONNX Runtime takes"

_STANDARD = (
    Op("LinearAttention", onnx_attention.linear_attention),
    Op("RotaryEmbedding", onnx_attention.rotary_embedding, cosines=1),
    Op("Attention", onnx_attention.standard_attention, Trait.MIXES),
    Op("Conv", onnx_convolutions.conv, Trait.LINEAR | Trait.SLIDES, contracts=(1,), summand=2),
    Op("ConvTranspose", onnx_convolutions.conv_transpose, contracts=(1,)),
    *each("GlobalAveragePool GlobalLpPool GlobalMaxPool", onnx_convolutions.global_pool),
    *each("AveragePool LpPool", onnx_convolutions.pool),
    Op("MaxPool", onnx_convolutions.pool, Trait.POINTS),
    Op("SwiGLU", meaning.pointwise, Trait.BROADCASTS),
    Op("ConstantOfShape", onnx_generators.constant_of_shape, evaluate=numbers.constant_of_shape),
    Op("Range", onnx_generators.counted, evaluate=numbers.counted),
    Op("RandomNormalLike", onnx_generators.drawn_like, Trait.RANDOM),
    *each("Bernoulli RandomUniformLike", onnx_generators.drawn_like, Trait.RANDOM, untested=DRAWN),
    Op("EyeLike", onnx_generators.eye_like),
    Op(
        "Concat",
        onnx_layout.concat,
        Trait.JOINS,
        evaluate=lambda i, a: [np.concatenate([np.asarray(x) for x in i], axis=int(a["axis"]))],
    ),
    Op("Expand", onnx_layout.expand, Trait.REPEATS, evaluate=numbers.expand),
    Op(
        "Flatten",
        onnx_layout.flatten,
        Trait.KEEPS_ORDER,
        evaluate=lambda i, a: [
            np.asarray(i[0]).reshape(int(np.prod(np.asarray(i[0]).shape[: int(a.get("axis", 1))], dtype=np.int64)), -1)
        ],
    ),
    Op("Pad", onnx_layout.pad),
    Op("Split", onnx_layout.parted, Trait.SPLITS, evaluate=numbers.parted),
    Op("Reshape", onnx_layout.reshape, Trait.KEEPS_ORDER | Trait.HANDS_ON, evaluate=numbers.reshape),
    Op("Slice", onnx_layout.sliced, Trait.SLICES, evaluate=numbers.sliced),
    Op("Squeeze", onnx_layout.squeeze, Trait.KEEPS_ORDER, evaluate=numbers.squeeze),
    Op(
        "Tile",
        onnx_layout.tile,
        Trait.REPEATS,
        evaluate=lambda i, a: [np.tile(np.asarray(i[0]), tuple(int(r) for r in np.asarray(i[1])))],
    ),
    Op(
        "Transpose",
        onnx_layout.transpose,
        Trait.TURNS,
        evaluate=lambda i, a: [np.transpose(np.asarray(i[0]), a.get("perm"))],
    ),
    Op("Unsqueeze", onnx_layout.unsqueeze, Trait.KEEPS_ORDER, evaluate=numbers.unsqueeze),
    Op("Compress", onnx_lookups.compress),
    Op(
        "Gather",
        onnx_lookups.gather,
        Trait.LOOKS_UP,
        evaluate=lambda i, a: [np.take(np.asarray(i[0]), np.asarray(i[1]), axis=int(a.get("axis", 0)))],
    ),
    Op("GatherElements", onnx_lookups.gather_elements),
    Op("GatherND", onnx_lookups.gather_nd, Trait.LOOKS_UP),
    Op("NonZero", onnx_lookups.non_zero),
    Op("OneHot", onnx_lookups.one_hot, evaluate=numbers.one_hot),
    *each("Scatter ScatterElements", onnx_lookups.scatter_elements),
    Op("ScatterND", onnx_lookups.scatter_nd),
    *each("BatchNormalization InstanceNormalization", onnx_normalisation.channel_normalization),
    Op("GroupNormalization", onnx_normalisation.group_normalization),
    *each("LayerNormalization RMSNormalization SimplifiedLayerNormalization", onnx_normalisation.layer_normalization),
    Op("LRN", onnx_normalisation.local_response),
    Op("MeanVarianceNormalization", onnx_normalisation.mean_variance),
    Op("AffineGrid", onnx_places.affine_grid),
    Op("CenterCropPad", onnx_places.center_crop_pad),
    Op("Col2Im", onnx_places.columns_to_image),
    Op("DeformConv", onnx_places.deformable),
    Op("DepthToSpace", onnx_places.depth_to_space),
    Op("Det", meaning.determinant),
    Op("Multinomial", onnx_places.drawn_by, Trait.RANDOM, untested=DRAWN),
    *each("RandomNormal RandomUniform", onnx_places.drawn_from, Trait.RANDOM, untested=DRAWN),
    Op("GridSample", meaning.sample),
    Op("MaxUnpool", onnx_places.max_unpool),
    *each("MaxRoiPool RoiAlign", onnx_places.regions),
    *each("Resize Upsample", onnx_places.resize),
    Op("ReverseSequence", onnx_places.reverse_sequence),
    Op("SpaceToDepth", onnx_places.space_to_depth),
    Op("NonMaxSuppression", onnx_places.suppression),
    Op("TensorScatter", onnx_places.tensor_scatter, untested=NEW),
    Op("Trilu", meaning.triangle),
    Op("Unique", onnx_places.unique),
    Op("Equal", onnx_pointwise.equal, Trait.BROADCASTS, evaluate=numbers.elementwise(np.equal)),
    Op(
        "Add",
        meaning.pointwise,
        Trait.BROADCASTS | Trait.ARITHMETIC | Trait.ADDS | Trait.SUMS | Trait.INDEXES,
        evaluate=numbers.same_type(np.add),
        bias_inputs=(0, 1),
    ),
    Op("And", meaning.pointwise, Trait.BROADCASTS, evaluate=numbers.elementwise(np.logical_and)),
    *each("BitShift BitwiseAnd BitwiseOr", meaning.pointwise, Trait.BROADCASTS | Trait.UNPACKS),
    *each("BitwiseXor Mean PRelu Xor", meaning.pointwise, Trait.BROADCASTS),
    Op("Div", meaning.pointwise, Trait.BROADCASTS | Trait.ARITHMETIC | Trait.SCALES, evaluate=numbers.divide),
    Op("Greater", meaning.pointwise, Trait.BROADCASTS | Trait.COMPARES, evaluate=numbers.elementwise(np.greater)),
    Op(
        "GreaterOrEqual",
        meaning.pointwise,
        Trait.BROADCASTS | Trait.COMPARES | Trait.INDEXES,
        evaluate=numbers.elementwise(np.greater_equal),
    ),
    Op("Less", meaning.pointwise, Trait.BROADCASTS | Trait.COMPARES | Trait.INDEXES, evaluate=numbers.elementwise(np.less)),
    Op("LessOrEqual", meaning.pointwise, Trait.BROADCASTS | Trait.COMPARES, evaluate=numbers.elementwise(np.less_equal)),
    Op("Max", meaning.pointwise, Trait.BROADCASTS | Trait.EXTREMES | Trait.INDEXES, evaluate=numbers.folded(np.maximum)),
    Op("Min", meaning.pointwise, Trait.BROADCASTS | Trait.EXTREMES | Trait.INDEXES, evaluate=numbers.folded(np.minimum)),
    Op(
        "Mod",
        meaning.pointwise,
        Trait.BROADCASTS | Trait.UNPACKS | Trait.INDEXES,
        evaluate=lambda i, a: [(np.fmod if a.get("fmod", 0) else np.mod)(np.asarray(i[0]), np.asarray(i[1]))],
    ),
    Op(
        "Mul",
        meaning.pointwise,
        Trait.BROADCASTS | Trait.ARITHMETIC | Trait.SCALES | Trait.INDEXES,
        evaluate=numbers.same_type(np.multiply),
    ),
    Op("Or", meaning.pointwise, Trait.BROADCASTS, evaluate=numbers.elementwise(np.logical_or)),
    Op("Pow", meaning.pointwise, Trait.BROADCASTS, evaluate=numbers.same_type(np.power)),
    Op(
        "Sub",
        meaning.pointwise,
        Trait.BROADCASTS | Trait.ARITHMETIC | Trait.SUMS | Trait.INDEXES,
        evaluate=numbers.same_type(np.subtract),
    ),
    Op("Sum", meaning.pointwise, Trait.BROADCASTS | Trait.SUMS, fold=numbers.summed),
    Op(
        "Where", meaning.pointwise, Trait.BROADCASTS | Trait.CHOOSES | Trait.INDEXES, evaluate=numbers.elementwise(np.where)
    ),
    Op("Abs", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.abs)),
    Op("BitCast", meaning.like_first, Trait.UNARY, untested=NEW),
    *each(
        "Acos Acosh Asin Asinh Atan Atanh BitwiseNot Celu Cos Cosh Elu Erf Gelu HardSigmoid HardSwish "
        "IsInf IsNaN LeakyRelu Mish Relu Round Selu Shrink Sin Sinh Softsign Swish Tan ThresholdedRelu",
        meaning.like_first,
        Trait.UNARY,
    ),
    Op("Cast", meaning.like_first, COPYING, evaluate=numbers.cast),
    Op("Ceil", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.ceil)),
    Op("Exp", meaning.like_first, Trait.UNARY, fold=numbers.unary(np.exp)),
    Op("Floor", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.floor)),
    Op("Identity", meaning.like_first, COPYING | Trait.HANDS_ON, evaluate=numbers.elementwise(lambda x: x)),
    Op("Log", meaning.like_first, Trait.UNARY, fold=numbers.unary(np.log)),
    Op("Neg", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.negative)),
    Op("Not", meaning.like_first, Trait.UNARY | Trait.INDEXES, evaluate=numbers.elementwise(np.logical_not)),
    Op("Reciprocal", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.reciprocal)),
    Op("Sigmoid", meaning.like_first, Trait.UNARY, fold=numbers.unary(lambda x: 1 / (1 + np.exp(-x)))),
    Op("Sign", meaning.like_first, Trait.UNARY, fold=numbers.unary(np.sign)),
    Op("Softplus", meaning.like_first, Trait.UNARY, fold=numbers.unary(lambda x: np.logaddexp(x, np.zeros((), x.dtype)))),
    Op("Sqrt", meaning.like_first, Trait.UNARY, evaluate=numbers.same_type(np.sqrt)),
    Op("Tanh", meaning.like_first, Trait.UNARY, fold=numbers.unary(np.tanh)),
    Op("CastLike", meaning.like_first, COPYING),
    Op("Clip", meaning.like_first, Trait.UNARY | Trait.INDEXES, fold=numbers.clip),
    Op("Dropout", meaning.like_first, Trait.UNARY | Trait.DROPS | Trait.HANDS_ON),
    Op(
        "Einsum",
        meaning.einsum,
        Trait.LINEAR,
        fold=lambda i, a: [np.einsum(str(a["equation"]).replace(" ", ""), *(np.asarray(x) for x in i), optimize=True)],
        contracts=(0, 1, 2),
    ),
    Op("Gemm", onnx_products.gemm, Trait.LINEAR, fold=numbers.gemm, contracts=(0, 1), summand=2),
    Op(
        "MatMul",
        onnx_products.matmul,
        Trait.LINEAR,
        fold=lambda i, a: [np.matmul(np.asarray(i[0]), np.asarray(i[1]))],
        contracts=(0, 1),
    ),
    Op("CausalConvWithState", onnx_recurrent.causal_convolution),
    *each("GRU LSTM RNN", onnx_recurrent.recurrent, Trait.RECURS),
    *each("ArgMax ArgMin", onnx_reductions.place_of_best, Trait.POINTS),
    *each("CumProd CumSum", onnx_reductions.cumulated),
    *each("Hardmax LogSoftmax", onnx_reductions.softmax_of_rows),
    *each("Hardmax LogSoftmax", onnx_reductions.softmax, since=13),
    Op("Softmax", onnx_reductions.softmax_of_rows, Trait.SHARES),
    Op("Softmax", onnx_reductions.softmax, Trait.SHARES, since=13),
    Op("LpNormalization", onnx_reductions.softmax, fold=numbers.lp_normalization),
    Op(
        "ReduceL1",
        onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sum(np.abs(x), axis, keepdims=keepdims)),
    ),
    Op(
        "ReduceL2",
        onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis, keepdims=keepdims))),
    ),
    *each("ReduceLogSum ReduceLogSumExp", onnx_reductions.reduce),
    Op("ReduceMax", onnx_reductions.reduce, evaluate=numbers.reduced(np.max)),
    Op("ReduceMean", onnx_reductions.reduce, fold=numbers.norm(np.mean)),
    Op("ReduceMin", onnx_reductions.reduce, evaluate=numbers.reduced(np.min)),
    Op("ReduceProd", onnx_reductions.reduce, evaluate=numbers.reduced(np.prod)),
    Op("ReduceSum", onnx_reductions.reduce, evaluate=numbers.reduced(np.sum)),
    Op(
        "ReduceSumSquare",
        onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sum(x * x, axis, keepdims=keepdims)),
    ),
    Op("TopK", onnx_reductions.top_k, Trait.POINTS),
    *each("Constant If"),
    Op(
        "Shape",
        traits=Trait.SHAPES,
        fold=lambda i, a: [np.asarray(np.asarray(i[0]).shape[a.get("start", 0) : a.get("end")], np.int64)],
    ),
    Op("Size", traits=Trait.SHAPES),
)
_CONTRIB = (
    *each(
        "DecoderAttention DecoderMaskedSelfAttention LongformerAttention PackedAttention PackedMultiHeadAttention",
        onnx_attention.attention_left_alone,
        untested="left alone by the rule of DecoderMaskedMultiHeadAttention, which is tested",
    ),
    Op("DecoderMaskedMultiHeadAttention", onnx_attention.attention_left_alone),
    Op("PagedAttention", onnx_attention.attention_left_alone, Trait.CAUSAL, untested=GPU),
    Op("SparseAttention", onnx_attention.attention_left_alone, Trait.CAUSAL),
    Op("Attention", onnx_attention.contrib_attention),
    Op("MRotaryEmbedding", onnx_attention.contrib_rotary_embedding, untested=GPU),
    Op("RotaryEmbedding", onnx_attention.contrib_rotary_embedding, cosines=2),
    Op("GatedRelativePositionBias", onnx_attention.gated_relative_position_bias),
    Op("GemmaRotaryEmbedding", onnx_attention.gemma_rotary_embedding, untested=GPU),
    Op("GroupQueryAttention", onnx_attention.group_query_attention, Trait.CAUSAL, cosines=7),
    Op("LinearAttention", onnx_attention.linear_attention),
    Op("MultiHeadAttention", onnx_attention.multi_head_attention),
    Op("FusedConv", onnx_convolutions.conv, contracts=(1,)),
    Op("BiasSplitGelu", onnx_fused.bias_split_gelu),
    *each("NhwcConv NhwcFusedConv", onnx_convolutions.channels_last_conv, contracts=(1,)),
    Op("GatedRMSNorm", onnx_fused.gated_rms_norm, untested=GPU),
    Op("MoE", onnx_fused.mixture_of_experts),
    Op("BiasSoftmax", onnx_normalisation.bias_softmax),
    *each("GroupNorm SkipGroupNorm", onnx_normalisation.contrib_group_norm),
    Op("EmbedLayerNormalization", onnx_normalisation.embed_layer_normalization),
    *each("LayerNormalization SimplifiedLayerNormalization", onnx_normalisation.layer_normalization),
    Op("SkipLayerNormalization", onnx_normalisation.skip_layer_normalization, Trait.SKIPS, bias_inputs=(4,)),
    Op("SkipSimplifiedLayerNormalization", onnx_normalisation.skip_layer_normalization, Trait.SKIPS, bias_inputs=(3,)),
    Op("GridSample", meaning.sample),
    Op("Trilu", meaning.triangle),
    *each("BiasAdd BiasGelu FastGelu", meaning.pointwise, Trait.BROADCASTS, bias_inputs=(1,)),
    *each("Gelu QuickGelu", meaning.like_first, Trait.UNARY),
    *each("FusedMatMul TransposeMatMul", onnx_products.fused_matmul, Trait.LINEAR, contracts=(0, 1)),
    Op("FusedGemm", onnx_products.gemm, contracts=(0, 1)),
    Op("GemmFastGelu", onnx_products.gemm),
    Op("CausalConvWithState", onnx_recurrent.causal_convolution),
    Op("FusedMatMulActivation", contracts=(0, 1)),
)
_ATEN = (
    *each("addmm baddbmm", aten.addmm, Trait.LINEAR, summand=0),
    *each("_log_softmax cummax cummin cumprod cumsum log_softmax logcumsumexp sort", aten.along_axis),
    *each("_safe_softmax _softmax softmax", aten.along_axis, Trait.SHARES),
    Op("view_as_complex", aten.as_complex),
    Op("view_as_real", aten.as_real),
    Op("scaled_dot_product_attention", aten.attention, Trait.MIXES),
    *each("cat concat concatenate hstack", aten.cat, Trait.JOINS),
    *each("_native_batch_norm_legit_no_training instance_norm", aten.channel_norm),
    Op("batch_norm", aten.channel_norm, untested=OLDER),
    *each("channel_shuffle native_channel_shuffle", aten.channel_shuffle),
    Op("col2im", aten.columns_to_image),
    *each("conv1d conv2d conv3d convolution", aten.convolution, Trait.LINEAR | Trait.SLIDES, summand=2),
    *each("conv_transpose1d conv_transpose2d conv_transpose3d", aten.convolution),
    *each("arange eye linspace scalar_tensor", aten.counted),
    Op("diagonal", aten.diagonal),
    Op("einsum", meaning.einsum, Trait.LINEAR),
    Op("expand", aten.expand, Trait.REPEATS),
    *each("max min", aten.extremum),
    *each("full new_full new_ones new_zeros ones zeros", aten.filled),
    *each("empty new_empty", aten.filled, untested=ANY),
    Op("gather", aten.gather, Trait.LOOKS_UP),
    Op("glu", aten.glu),
    *each("group_norm native_group_norm", aten.group_norm),
    Op("im2col", aten.image_to_columns),
    Op("index", aten.index, Trait.LOOKS_UP),
    *each("index_add index_copy index_fill", aten.index_along),
    Op("index_put", aten.index_put),
    *each("layer_norm native_layer_norm rms_norm", aten.layer_norm),
    Op("linear", aten.linear, Trait.LINEAR, summand=2),
    *each("embedding index_select", aten.looked_up, Trait.LOOKS_UP),
    *each("bmm matmul mm", aten.matmul, Trait.LINEAR),
    *each("dot mv", aten.matmul),
    *each("flip roll", aten.moved_along),
    *each(
        "constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d",
        aten.pad,
    ),
    Op("permute", aten.permute, Trait.TURNS),
    Op("pixel_shuffle", aten.pixel_shuffle),
    Op("pixel_unshuffle", aten.pixel_unshuffle),
    *each(
        "_adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
        "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_trilinear3d",
        aten.pool,
    ),
    *each(
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices",
        aten.pool,
        Trait.POINTS,
    ),
    Op("prelu", aten.prelu, Trait.BROADCASTS),
    *each(
        "all amax amin aminmax any count_nonzero kthvalue linalg_vector_norm logsumexp mean median nanmean "
        "nansum norm prod std std_mean sum var var_mean",
        aten.reduce,
    ),
    *each("repeat tile", aten.repeat, Trait.REPEATS),
    Op("repeat_interleave", aten.repeat_interleave),
    *each("gru lstm rnn_relu rnn_tanh", aten.recurrent, Trait.RECURS),
    *each("scatter scatter_add scatter_reduce", aten.scatter),
    Op("select_scatter", aten.select_scatter),
    *each("argmax argmin", aten.reduce, Trait.POINTS),
    Op("diff", aten.shorter_axis),
    Op("topk", aten.shorter_axis, Trait.POINTS),
    Op("slice", aten.sliced, Trait.SLICES),
    Op("slice_scatter", aten.slice_scatter),
    *each("split split_with_sizes split_with_sizes_copy unsafe_split", aten.split, Trait.SPLITS),
    Op("squeeze", aten.squeeze, Trait.KEEPS_ORDER),
    Op("stack", aten.stack),
    *each("select unbind", aten.taken_apart),
    *each("t transpose", aten.transpose, Trait.TURNS),
    Op("unfold", aten.unfold),
    Op("unsqueeze", aten.unsqueeze, Trait.KEEPS_ORDER),
    *each("_unsafe_view view view_copy", aten.view, Trait.KEEPS_ORDER | Trait.HANDS_ON),
    Op("linalg_det", meaning.determinant),
    *each("full_like ones_like type_as zeros_like", meaning.like_first),
    Op("empty_like", meaning.like_first, untested=ANY),
    Op("rand_like", meaning.like_first, Trait.RANDOM, untested=DRAWN),
    *each(
        "__and__ __lshift__ __or__ __rshift__ __xor__ _prelu_kernel abs absolute acos acosh addcdiv addcmul asin asinh "
        "atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil "
        "celu clamp clamp_max clamp_min clip copy copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv "
        "exp exp2 expm1 fill float_power floor floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt "
        "hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu lerp less less_equal lgamma "
        "log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt "
        "masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal polar pow rad2deg "
        "reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus "
        "sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy zero",
        meaning.pointwise,
        Trait.BROADCASTS,
    ),
    Op("lift_fresh_copy", meaning.pointwise, Trait.BROADCASTS, untested=OLDER),
    *each("_to_copy detach", meaning.pointwise, Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS),
    Op("add", meaning.pointwise, Trait.BROADCASTS | Trait.ADDS, bias_inputs=(0, 1)),
    *each("alias clone", meaning.pointwise, Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS | Trait.HANDS_ON),
    Op("dropout", meaning.pointwise, Trait.BROADCASTS | Trait.DROPS | Trait.HANDS_ON, untested=IDLE),
    Op("native_dropout", meaning.pointwise, Trait.BROADCASTS | Trait.DROPS),
    *each("grid_sampler grid_sampler_2d grid_sampler_3d", meaning.sample),
    *each("tril triu", meaning.triangle),
)

OPERATORS = table_of({"": _STANDARD, MICROSOFT: _CONTRIB, ATEN: _ATEN})
"""The rows of each operator, by (domain, name)."""
UNKNOWN = Op("")


def operator(domain: str | None, name: str, opset: int | None = None) -> Op:
    """Returns the row of an operator, for a version of the operator set (None: the newest); an empty one if it has none."""
    rows = OPERATORS.get(("" if domain in STANDARD else str(domain), name), ())
    return next((op for op in reversed(rows) if opset is None or op.since <= opset), UNKNOWN)


def has(node: gs.Node, traits: Trait) -> bool:
    """Returns whether the operator of a node has any of some traits."""
    return bool(_traits(node.domain, node.op) & traits._value_)


@functools.cache
def _traits(domain: str | None, name: str) -> int:
    """Returns the traits of an operator as a number: they are asked for at every node, and a Flag is slow."""
    return int(operator(domain, name).traits.value)
