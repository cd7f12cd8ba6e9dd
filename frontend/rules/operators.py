"""One row an operator: what it means, and all that is known of it by name.

What a list of operator names would say is a query of this table: :func:`has`, or a column of :func:`operator`.
"""

from __future__ import annotations

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
UNTRACED = "no test is known to trace it: torch.export writes other operators in its place"
NEW = "newer than the operators that ONNX Runtime takes"

_STANDARD = (
    Op("LinearAttention", onnx_attention.linear_attention),
    Op("RotaryEmbedding", onnx_attention.rotary_embedding, cosines=1),
    Op("Attention", onnx_attention.standard_attention),
    Op("Conv", onnx_convolutions.conv, Trait.LINEAR, contracts=(1,)),
    Op("ConvTranspose", onnx_convolutions.conv_transpose, contracts=(1,)),
    *each("GlobalAveragePool GlobalLpPool GlobalMaxPool", onnx_convolutions.global_pool),
    *each("AveragePool LpPool MaxPool", onnx_convolutions.pool),
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
    Op("Det", onnx_places.determinant),
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
    Op("Trilu", onnx_places.triangle),
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
    Op("Div", meaning.pointwise, Trait.BROADCASTS | Trait.ARITHMETIC, evaluate=numbers.divide),
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
        Trait.BROADCASTS | Trait.ARITHMETIC | Trait.INDEXES,
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
    Op("Where", meaning.pointwise, Trait.BROADCASTS | Trait.INDEXES, evaluate=numbers.elementwise(np.where)),
    Op("Abs", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.abs)),
    Op("BitCast", onnx_pointwise.unary, Trait.UNARY, untested=NEW),
    *each(
        "Acos Acosh Asin Asinh Atan Atanh BitwiseNot Celu Cos Cosh Elu Erf Gelu HardSigmoid HardSwish "
        "IsInf IsNaN LeakyRelu Mish Relu Round Selu Shrink Sin Sinh Softsign Swish Tan ThresholdedRelu",
        onnx_pointwise.unary,
        Trait.UNARY,
    ),
    Op("Cast", onnx_pointwise.unary, COPYING, evaluate=numbers.cast),
    Op("Ceil", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.ceil)),
    Op("Exp", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(np.exp)),
    Op("Floor", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.floor)),
    Op("Identity", onnx_pointwise.unary, COPYING | Trait.HANDS_ON, evaluate=numbers.elementwise(lambda x: x)),
    Op("Log", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(np.log)),
    Op("Neg", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.negative)),
    Op("Not", onnx_pointwise.unary, Trait.UNARY | Trait.INDEXES, evaluate=numbers.elementwise(np.logical_not)),
    Op("Reciprocal", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.reciprocal)),
    Op("Sigmoid", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(lambda x: 1 / (1 + np.exp(-x)))),
    Op("Sign", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(np.sign)),
    Op("Softplus", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(lambda x: np.logaddexp(x, np.zeros((), x.dtype)))),
    Op("Sqrt", onnx_pointwise.unary, Trait.UNARY, evaluate=numbers.same_type(np.sqrt)),
    Op("Tanh", onnx_pointwise.unary, Trait.UNARY, fold=numbers.unary(np.tanh)),
    Op("CastLike", onnx_pointwise.unary_with_settings, COPYING),
    Op("Clip", onnx_pointwise.unary_with_settings, Trait.UNARY | Trait.INDEXES, fold=numbers.clip),
    Op("Dropout", onnx_pointwise.unary_with_settings, Trait.UNARY | Trait.DROPS | Trait.HANDS_ON),
    Op(
        "Einsum",
        onnx_products.einsum,
        Trait.LINEAR,
        fold=lambda i, a: [np.einsum(str(a["equation"]).replace(" ", ""), *(np.asarray(x) for x in i), optimize=True)],
        contracts=(0, 1, 2),
    ),
    Op("Gemm", onnx_products.gemm, Trait.LINEAR, fold=numbers.gemm, contracts=(0, 1)),
    Op(
        "MatMul",
        onnx_products.matmul,
        Trait.LINEAR,
        fold=lambda i, a: [np.matmul(np.asarray(i[0]), np.asarray(i[1]))],
        contracts=(0, 1),
    ),
    Op("CausalConvWithState", onnx_recurrent.causal_convolution),
    *each("GRU LSTM RNN", onnx_recurrent.recurrent, Trait.RECURS),
    *each("ArgMax ArgMin", onnx_reductions.place_of_best),
    *each("CumProd CumSum", onnx_reductions.cumulated),
    *each("Hardmax LogSoftmax Softmax", onnx_reductions.softmax_of_rows),
    *each("Hardmax LogSoftmax Softmax", onnx_reductions.softmax, since=13),
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
    Op("TopK", onnx_reductions.top_k),
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
    Op("Trilu", onnx_places.triangle),
    *each("BiasAdd BiasGelu FastGelu", meaning.pointwise, Trait.BROADCASTS, bias_inputs=(1,)),
    *each("Gelu QuickGelu", onnx_pointwise.unary, Trait.UNARY),
    *each("FusedMatMul TransposeMatMul", onnx_products.fused_matmul, Trait.LINEAR, contracts=(0, 1)),
    Op("FusedGemm", onnx_products.gemm, contracts=(0, 1)),
    Op("GemmFastGelu", onnx_products.gemm),
    Op("CausalConvWithState", onnx_recurrent.causal_convolution),
    Op("FusedMatMulActivation", contracts=(0, 1)),
)
_ATEN = (
    Op("addmm", aten.addmm),
    Op("baddbmm", aten.addmm, untested=UNTRACED),
    *each("cumsum log_softmax softmax sort", aten.along_axis),
    *each("_log_softmax _safe_softmax _softmax", aten.along_axis, untested=UNTRACED),
    Op("view_as_complex", aten.as_complex),
    Op("view_as_real", aten.as_real),
    Op("scaled_dot_product_attention", aten.attention),
    *each("cat concat", aten.cat, Trait.JOINS),
    Op("concatenate", aten.cat, Trait.JOINS, untested=UNTRACED),
    *each("batch_norm instance_norm", aten.channel_norm),
    Op("_native_batch_norm_legit_no_training", aten.channel_norm, untested=UNTRACED),
    Op("channel_shuffle", aten.channel_shuffle),
    *each("col2im im2col", aten.columns),
    *each("conv1d conv2d conv3d convolution", aten.convolution),
    *each("arange eye linspace", aten.counted),
    Op("scalar_tensor", aten.counted, untested=UNTRACED),
    Op("diagonal", aten.diagonal),
    Op("einsum", aten.einsum),
    Op("embedding", aten.embedding, Trait.LOOKS_UP),
    Op("expand", aten.expand, Trait.REPEATS),
    *each("max min", aten.extremum, untested=UNTRACED),
    *each("full new_full new_ones new_zeros ones zeros", aten.filled),
    *each("empty new_empty", aten.filled, untested=UNTRACED),
    Op("flatten", aten.flatten, Trait.KEEPS_ORDER, untested=UNTRACED),
    Op("gather", aten.gather, Trait.LOOKS_UP),
    Op("glu", aten.glu),
    Op("grid_sampler", meaning.sample),
    *each("grid_sampler_2d grid_sampler_3d", meaning.sample, untested=UNTRACED),
    *each("group_norm native_group_norm", aten.group_norm),
    Op("index", aten.index, Trait.LOOKS_UP),
    Op("index_select", aten.index_select, Trait.LOOKS_UP),
    *each("layer_norm rms_norm", aten.layer_norm),
    Op("native_layer_norm", aten.layer_norm, untested=UNTRACED),
    *each("full_like ones_like zeros_like", aten.like_first),
    *each("empty_like type_as", aten.like_first, untested=UNTRACED),
    Op("rand_like", aten.like_first, Trait.RANDOM, untested=UNTRACED),
    Op("linear", aten.linear),
    *each("bmm matmul mm", aten.matmul),
    *each("dot mv", aten.matmul, untested=UNTRACED),
    *each("flip roll", aten.moved_along),
    *each(
        "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d", aten.pad
    ),
    *each("pad reflection_pad3d", aten.pad, untested=UNTRACED),
    Op("permute", aten.permute, Trait.TURNS),
    *each("pixel_shuffle pixel_unshuffle", aten.pixel_shuffle),
    *each(
        "__and__ __or__ __xor__ abs acos acosh asin asinh atan atan2 atanh bitwise_and bitwise_not "
        "bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min cos cosh div elu eq erf erfc exp "
        "expm1 floor floor_divide fmod ge gelu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le "
        "leaky_relu lerp log log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor "
        "lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg polar pow reciprocal relu "
        "relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus sqrt square sub tan "
        "tanh threshold trunc where xlogy",
        meaning.pointwise,
        Trait.BROADCASTS,
    ),
    *each(
        "clip copy detach_ fill lift_fresh lift_fresh_copy _prelu_kernel softsign",
        meaning.pointwise,
        Trait.BROADCASTS,
        untested=UNTRACED,
    ),
    Op("prelu", aten.prelu, Trait.BROADCASTS),
    Op("_to_copy", meaning.pointwise, Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS),
    *each(
        "contiguous detach to", meaning.pointwise, Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS, untested=UNTRACED
    ),
    Op("add", meaning.pointwise, Trait.BROADCASTS | Trait.ADDS, bias_inputs=(0, 1)),
    *each("alias clone", meaning.pointwise, Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS | Trait.HANDS_ON),
    Op("dropout", meaning.pointwise, Trait.BROADCASTS | Trait.DROPS | Trait.HANDS_ON),
    *each("feature_dropout native_dropout", meaning.pointwise, Trait.BROADCASTS | Trait.DROPS, untested=UNTRACED),
    *each(
        "_upsample_nearest_exact1d _upsample_nearest_exact2d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d "
        "avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool2d_with_indices max_pool3d "
        "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d",
        aten.pool,
    ),
    *each(
        "_adaptive_avg_pool2d _adaptive_avg_pool3d max_pool1d_with_indices max_pool3d_with_indices",
        aten.pool,
        untested=UNTRACED,
    ),
    *each("all amax amin any argmax argmin linalg_vector_norm logsumexp mean norm prod std sum var_mean", aten.reduce),
    Op("var", aten.reduce, untested=UNTRACED),
    Op("repeat", aten.repeat, Trait.REPEATS),
    Op("tile", aten.repeat, Trait.REPEATS, untested=UNTRACED),
    Op("repeat_interleave", aten.repeat_interleave),
    *each("scatter scatter_add scatter_reduce", aten.scatter),
    Op("select", aten.select),
    Op("select_scatter", aten.select_scatter),
    *each("diff topk", aten.shorter_axis),
    Op("slice_scatter", aten.slice_scatter),
    Op("slice", aten.sliced, Trait.SLICES),
    Op("narrow", aten.sliced, Trait.SLICES, untested=UNTRACED),
    *each("split split_with_sizes", aten.split, Trait.SPLITS),
    *each("chunk split_with_sizes_copy", aten.split, Trait.SPLITS, untested=UNTRACED),
    Op("squeeze", aten.squeeze, Trait.KEEPS_ORDER),
    Op("stack", aten.stack),
    *each("t transpose", aten.transpose, Trait.TURNS),
    *each("mT numpy_T", aten.transpose, Trait.TURNS, untested=UNTRACED),
    *each("tril triu", aten.triangle),
    Op("unbind", aten.unbind),
    Op("unflatten", aten.unflatten, untested=UNTRACED),
    Op("unsqueeze", aten.unsqueeze, Trait.KEEPS_ORDER),
    *each("_unsafe_view reshape view view_copy", aten.view, Trait.KEEPS_ORDER | Trait.HANDS_ON),
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
    return bool(operator(node.domain, node.op).traits & traits)
