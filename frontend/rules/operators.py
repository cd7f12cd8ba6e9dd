"""One row an operator: what it means, and all that is known of it by name.

What a list of operator names would say is a query of this table: :func:`has`, or a column of :func:`operator`.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import STANDARD
from liar_opt.frontend.rules import (
    aten,
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
POINTWISE = Trait.UNARY | Trait.BROADCASTS
"""Operators that compute element by element."""

_STANDARD = (
    Op("LinearAttention", rule=onnx_attention.linear_attention),
    Op("RotaryEmbedding", rule=onnx_attention.rotary_embedding, cosines=1),
    Op("Attention", rule=onnx_attention.standard_attention),
    Op("Conv", rule=onnx_convolutions.conv, traits=Trait.LINEAR, contracts=(1,)),
    Op("ConvTranspose", rule=onnx_convolutions.conv_transpose, contracts=(1,)),
    *each("GlobalAveragePool GlobalLpPool GlobalMaxPool", rule=onnx_convolutions.global_pool),
    *each("AveragePool LpPool MaxPool", rule=onnx_convolutions.pool),
    Op("SwiGLU", rule=onnx_fused.swiglu, traits=Trait.BROADCASTS),
    Op("ConstantOfShape", rule=onnx_generators.constant_of_shape, evaluate=numbers.constant_of_shape),
    Op("Range", rule=onnx_generators.counted, evaluate=numbers.counted),
    *each("Bernoulli RandomNormalLike RandomUniformLike", rule=onnx_generators.drawn_like, traits=Trait.RANDOM),
    Op("EyeLike", rule=onnx_generators.eye_like),
    Op(
        "Concat",
        rule=onnx_layout.concat,
        traits=Trait.JOINS,
        evaluate=lambda i, a: [np.concatenate([np.asarray(x) for x in i], axis=int(a["axis"]))],
    ),
    Op("Expand", rule=onnx_layout.expand, traits=Trait.REPEATS, evaluate=numbers.expand),
    Op(
        "Flatten",
        rule=onnx_layout.flatten,
        traits=Trait.KEEPS_ORDER,
        evaluate=lambda i, a: [
            np.asarray(i[0]).reshape(int(np.prod(np.asarray(i[0]).shape[: int(a.get("axis", 1))], dtype=np.int64)), -1)
        ],
    ),
    Op("Pad", rule=onnx_layout.pad),
    Op("Split", rule=onnx_layout.parted, traits=Trait.SPLITS, evaluate=numbers.parted),
    Op("Reshape", rule=onnx_layout.reshape, traits=Trait.KEEPS_ORDER | Trait.HANDS_ON, evaluate=numbers.reshape),
    Op("Slice", rule=onnx_layout.sliced, traits=Trait.SLICES, evaluate=numbers.sliced),
    Op("Squeeze", rule=onnx_layout.squeeze, traits=Trait.KEEPS_ORDER, evaluate=numbers.squeeze),
    Op(
        "Tile",
        rule=onnx_layout.tile,
        traits=Trait.REPEATS,
        evaluate=lambda i, a: [np.tile(np.asarray(i[0]), tuple(int(r) for r in np.asarray(i[1])))],
    ),
    Op(
        "Transpose",
        rule=onnx_layout.transpose,
        traits=Trait.TURNS,
        evaluate=lambda i, a: [np.transpose(np.asarray(i[0]), a.get("perm"))],
    ),
    Op("Unsqueeze", rule=onnx_layout.unsqueeze, traits=Trait.KEEPS_ORDER, evaluate=numbers.unsqueeze),
    Op("Compress", rule=onnx_lookups.compress),
    Op(
        "Gather",
        rule=onnx_lookups.gather,
        traits=Trait.LOOKS_UP,
        evaluate=lambda i, a: [np.take(np.asarray(i[0]), np.asarray(i[1]), axis=int(a.get("axis", 0)))],
    ),
    Op("GatherElements", rule=onnx_lookups.gather_elements),
    Op("GatherND", rule=onnx_lookups.gather_nd, traits=Trait.LOOKS_UP),
    Op("NonZero", rule=onnx_lookups.non_zero),
    Op("OneHot", rule=onnx_lookups.one_hot, evaluate=numbers.one_hot),
    *each("Scatter ScatterElements", rule=onnx_lookups.scatter_elements),
    Op("ScatterND", rule=onnx_lookups.scatter_nd),
    *each("BatchNormalization InstanceNormalization", rule=onnx_normalisation.channel_normalization),
    Op("GroupNormalization", rule=onnx_normalisation.group_normalization),
    *each("LayerNormalization RMSNormalization SimplifiedLayerNormalization", rule=onnx_normalisation.layer_normalization),
    Op("LRN", rule=onnx_normalisation.local_response),
    Op("MeanVarianceNormalization", rule=onnx_normalisation.mean_variance),
    Op("AffineGrid", rule=onnx_places.affine_grid),
    Op("CenterCropPad", rule=onnx_places.center_crop_pad),
    Op("Col2Im", rule=onnx_places.columns_to_image),
    Op("DeformConv", rule=onnx_places.deformable),
    Op("DepthToSpace", rule=onnx_places.depth_to_space),
    Op("Det", rule=onnx_places.determinant),
    Op("Multinomial", rule=onnx_places.drawn_by, traits=Trait.RANDOM),
    *each("RandomNormal RandomUniform", rule=onnx_places.drawn_from, traits=Trait.RANDOM),
    Op("GridSample", rule=onnx_places.grid_sample),
    Op("MaxUnpool", rule=onnx_places.max_unpool),
    *each("MaxRoiPool RoiAlign", rule=onnx_places.regions),
    *each("Resize Upsample", rule=onnx_places.resize),
    Op("ReverseSequence", rule=onnx_places.reverse_sequence),
    Op("SpaceToDepth", rule=onnx_places.space_to_depth),
    Op("NonMaxSuppression", rule=onnx_places.suppression),
    Op("TensorScatter", rule=onnx_places.tensor_scatter),
    Op("Trilu", rule=onnx_places.triangle),
    Op("Unique", rule=onnx_places.unique),
    Op("Equal", rule=onnx_pointwise.equal, traits=Trait.BROADCASTS, evaluate=numbers.elementwise(np.equal)),
    Op(
        "Add",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.ARITHMETIC | Trait.ADDS | Trait.SUMS | Trait.INDEXES,
        evaluate=numbers.same_type(np.add),
        bias_inputs=(0, 1),
    ),
    Op("And", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS, evaluate=numbers.elementwise(np.logical_and)),
    *each("BitShift BitwiseAnd BitwiseOr", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS | Trait.UNPACKS),
    *each("BitwiseXor Mean PRelu Xor", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS),
    Op("Div", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS | Trait.ARITHMETIC, evaluate=numbers.divide),
    Op(
        "Greater",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.COMPARES,
        evaluate=numbers.elementwise(np.greater),
    ),
    Op(
        "GreaterOrEqual",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.COMPARES | Trait.INDEXES,
        evaluate=numbers.elementwise(np.greater_equal),
    ),
    Op(
        "Less",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.COMPARES | Trait.INDEXES,
        evaluate=numbers.elementwise(np.less),
    ),
    Op(
        "LessOrEqual",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.COMPARES,
        evaluate=numbers.elementwise(np.less_equal),
    ),
    Op(
        "Max",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.EXTREMES | Trait.INDEXES,
        evaluate=numbers.folded(np.maximum),
    ),
    Op(
        "Min",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.EXTREMES | Trait.INDEXES,
        evaluate=numbers.folded(np.minimum),
    ),
    Op(
        "Mod",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.UNPACKS | Trait.INDEXES,
        evaluate=lambda i, a: [(np.fmod if a.get("fmod", 0) else np.mod)(np.asarray(i[0]), np.asarray(i[1]))],
    ),
    Op(
        "Mul",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.ARITHMETIC | Trait.INDEXES,
        evaluate=numbers.same_type(np.multiply),
    ),
    Op("Or", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS, evaluate=numbers.elementwise(np.logical_or)),
    Op("Pow", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS, evaluate=numbers.same_type(np.power)),
    Op(
        "Sub",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.ARITHMETIC | Trait.SUMS | Trait.INDEXES,
        evaluate=numbers.same_type(np.subtract),
    ),
    Op("Sum", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS | Trait.SUMS, fold=numbers.summed),
    Op(
        "Where",
        rule=onnx_pointwise.pointwise,
        traits=Trait.BROADCASTS | Trait.INDEXES,
        evaluate=numbers.elementwise(np.where),
    ),
    Op("Abs", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.abs)),
    *each(
        "Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Celu Cos Cosh Elu Erf Gelu HardSigmoid HardSwish "
        "IsInf IsNaN LeakyRelu Mish Relu Round Selu Shrink Sin Sinh Softsign Swish Tan ThresholdedRelu",
        rule=onnx_pointwise.unary,
        traits=Trait.UNARY,
    ),
    Op("Cast", rule=onnx_pointwise.unary, traits=Trait.KEEPS_ORDER | Trait.COPIES | Trait.UNARY, evaluate=numbers.cast),
    Op("Ceil", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.ceil)),
    Op("Exp", rule=onnx_pointwise.unary, traits=Trait.UNARY, fold=numbers.unary(np.exp)),
    Op("Floor", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.floor)),
    Op(
        "Identity",
        rule=onnx_pointwise.unary,
        traits=Trait.KEEPS_ORDER | Trait.COPIES | Trait.UNARY | Trait.HANDS_ON,
        evaluate=numbers.elementwise(lambda x: x),
    ),
    Op("Log", rule=onnx_pointwise.unary, traits=Trait.UNARY, fold=numbers.unary(np.log)),
    Op("Neg", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.negative)),
    Op("Not", rule=onnx_pointwise.unary, traits=Trait.UNARY | Trait.INDEXES, evaluate=numbers.elementwise(np.logical_not)),
    Op("Reciprocal", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.reciprocal)),
    Op("Sigmoid", rule=onnx_pointwise.unary, traits=Trait.UNARY, fold=numbers.unary(lambda x: 1 / (1 + np.exp(-x)))),
    Op("Sign", rule=onnx_pointwise.unary, traits=Trait.UNARY, fold=numbers.unary(np.sign)),
    Op(
        "Softplus",
        rule=onnx_pointwise.unary,
        traits=Trait.UNARY,
        fold=numbers.unary(lambda x: np.logaddexp(x, np.zeros((), x.dtype))),
    ),
    Op("Sqrt", rule=onnx_pointwise.unary, traits=Trait.UNARY, evaluate=numbers.same_type(np.sqrt)),
    Op("Tanh", rule=onnx_pointwise.unary, traits=Trait.UNARY, fold=numbers.unary(np.tanh)),
    Op("CastLike", rule=onnx_pointwise.unary_with_settings, traits=Trait.KEEPS_ORDER | Trait.COPIES | Trait.UNARY),
    Op("Clip", rule=onnx_pointwise.unary_with_settings, traits=Trait.UNARY | Trait.INDEXES, fold=numbers.clip),
    Op("Dropout", rule=onnx_pointwise.unary_with_settings, traits=Trait.UNARY | Trait.DROPS | Trait.HANDS_ON),
    Op(
        "Einsum",
        rule=onnx_products.einsum,
        traits=Trait.LINEAR,
        fold=lambda i, a: [np.einsum(str(a["equation"]).replace(" ", ""), *(np.asarray(x) for x in i), optimize=True)],
        contracts=(0, 1, 2),
    ),
    Op("Gemm", rule=onnx_products.gemm, traits=Trait.LINEAR, fold=numbers.gemm, contracts=(0, 1)),
    Op(
        "MatMul",
        rule=onnx_products.matmul,
        traits=Trait.LINEAR,
        fold=lambda i, a: [np.matmul(np.asarray(i[0]), np.asarray(i[1]))],
        contracts=(0, 1),
    ),
    Op("CausalConvWithState", rule=onnx_recurrent.causal_convolution),
    *each("GRU LSTM RNN", rule=onnx_recurrent.recurrent, traits=Trait.RECURS),
    *each("ArgMax ArgMin CumProd CumSum Hardmax LogSoftmax Softmax", rule=onnx_reductions.along_axis),
    Op("LpNormalization", rule=onnx_reductions.along_axis, fold=numbers.lp_normalization),
    Op(
        "ReduceL1",
        rule=onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sum(np.abs(x), axis, keepdims=keepdims)),
    ),
    Op(
        "ReduceL2",
        rule=onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis, keepdims=keepdims))),
    ),
    *each("ReduceLogSum ReduceLogSumExp", rule=onnx_reductions.reduce),
    Op("ReduceMax", rule=onnx_reductions.reduce, evaluate=numbers.reduced(np.max)),
    Op("ReduceMean", rule=onnx_reductions.reduce, fold=numbers.norm(np.mean)),
    Op("ReduceMin", rule=onnx_reductions.reduce, evaluate=numbers.reduced(np.min)),
    Op("ReduceProd", rule=onnx_reductions.reduce, evaluate=numbers.reduced(np.prod)),
    Op("ReduceSum", rule=onnx_reductions.reduce, evaluate=numbers.reduced(np.sum)),
    Op(
        "ReduceSumSquare",
        rule=onnx_reductions.reduce,
        fold=numbers.norm(lambda x, axis, keepdims: np.sum(x * x, axis, keepdims=keepdims)),
    ),
    Op("TopK", rule=onnx_reductions.top_k),
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
        "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention LongformerAttention "
        "PackedAttention PackedMultiHeadAttention",
        rule=onnx_attention.attention_left_alone,
    ),
    *each("PagedAttention SparseAttention", rule=onnx_attention.attention_left_alone, traits=Trait.CAUSAL),
    Op("Attention", rule=onnx_attention.contrib_attention),
    Op("MRotaryEmbedding", rule=onnx_attention.contrib_rotary_embedding),
    Op("RotaryEmbedding", rule=onnx_attention.contrib_rotary_embedding, cosines=2),
    Op("GatedRelativePositionBias", rule=onnx_attention.gated_relative_position_bias),
    Op("GemmaRotaryEmbedding", rule=onnx_attention.gemma_rotary_embedding),
    Op("GroupQueryAttention", rule=onnx_attention.group_query_attention, traits=Trait.CAUSAL, cosines=7),
    Op("LinearAttention", rule=onnx_attention.linear_attention),
    Op("MultiHeadAttention", rule=onnx_attention.multi_head_attention),
    Op("FusedConv", rule=onnx_convolutions.conv, contracts=(1,)),
    Op("BiasSplitGelu", rule=onnx_fused.bias_split_gelu),
    *each("NhwcConv NhwcFusedConv", rule=onnx_fused.channels_last_conv, contracts=(1,)),
    Op("GatedRMSNorm", rule=onnx_fused.gated_rms_norm),
    Op("MoE", rule=onnx_fused.mixture_of_experts),
    Op("BiasSoftmax", rule=onnx_normalisation.bias_softmax),
    *each("GroupNorm SkipGroupNorm", rule=onnx_normalisation.contrib_group_norm),
    Op("EmbedLayerNormalization", rule=onnx_normalisation.embed_layer_normalization),
    *each("LayerNormalization SimplifiedLayerNormalization", rule=onnx_normalisation.layer_normalization),
    Op("SkipLayerNormalization", rule=onnx_normalisation.skip_layer_normalization, traits=Trait.SKIPS, bias_inputs=(4,)),
    Op(
        "SkipSimplifiedLayerNormalization",
        rule=onnx_normalisation.skip_layer_normalization,
        traits=Trait.SKIPS,
        bias_inputs=(3,),
    ),
    Op("GridSample", rule=onnx_places.grid_sample),
    Op("Trilu", rule=onnx_places.triangle),
    *each("BiasAdd BiasGelu FastGelu", rule=onnx_pointwise.pointwise, traits=Trait.BROADCASTS, bias_inputs=(1,)),
    *each("Gelu QuickGelu", rule=onnx_pointwise.unary, traits=Trait.UNARY),
    *each("FusedMatMul TransposeMatMul", rule=onnx_products.fused_matmul, traits=Trait.LINEAR, contracts=(0, 1)),
    Op("FusedGemm", rule=onnx_products.gemm, contracts=(0, 1)),
    Op("GemmFastGelu", rule=onnx_products.gemm),
    Op("CausalConvWithState", rule=onnx_recurrent.causal_convolution),
    Op("FusedMatMulActivation", contracts=(0, 1)),
)
_ATEN = (
    *each("addmm baddbmm", rule=aten.addmm),
    *each("_log_softmax _safe_softmax _softmax cumsum log_softmax softmax sort", rule=aten.along_axis),
    Op("view_as_complex", rule=aten.as_complex),
    Op("view_as_real", rule=aten.as_real),
    Op("scaled_dot_product_attention", rule=aten.attention),
    *each("cat concat concatenate", rule=aten.cat, traits=Trait.JOINS),
    *each("_native_batch_norm_legit_no_training batch_norm instance_norm", rule=aten.channel_norm),
    Op("channel_shuffle", rule=aten.channel_shuffle),
    *each("col2im im2col", rule=aten.columns),
    *each("conv1d conv2d conv3d convolution", rule=aten.convolution),
    *each("arange eye linspace scalar_tensor", rule=aten.counted),
    Op("diagonal", rule=aten.diagonal),
    Op("einsum", rule=aten.einsum),
    Op("embedding", rule=aten.embedding, traits=Trait.LOOKS_UP),
    Op("expand", rule=aten.expand, traits=Trait.REPEATS),
    *each("max min", rule=aten.extremum),
    *each("empty full new_empty new_full new_ones new_zeros ones zeros", rule=aten.filled),
    Op("flatten", rule=aten.flatten, traits=Trait.KEEPS_ORDER),
    Op("gather", rule=aten.gather, traits=Trait.LOOKS_UP),
    Op("glu", rule=aten.glu),
    *each("grid_sampler grid_sampler_2d grid_sampler_3d", rule=aten.grid_sampler),
    *each("group_norm native_group_norm", rule=aten.group_norm),
    Op("index", rule=aten.index, traits=Trait.LOOKS_UP),
    Op("index_select", rule=aten.index_select, traits=Trait.LOOKS_UP),
    *each("layer_norm native_layer_norm rms_norm", rule=aten.layer_norm),
    *each("empty_like full_like ones_like type_as zeros_like", rule=aten.like_first),
    Op("rand_like", rule=aten.like_first, traits=Trait.RANDOM),
    Op("linear", rule=aten.linear),
    *each("bmm dot matmul mm mv", rule=aten.matmul),
    *each("flip roll", rule=aten.moved_along),
    *each(
        "constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d",
        rule=aten.pad,
    ),
    Op("permute", rule=aten.permute, traits=Trait.TURNS),
    *each("pixel_shuffle pixel_unshuffle", rule=aten.pixel_shuffle),
    *each(
        "__and__ __or__ __xor__ abs acos acosh asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or "
        "bitwise_xor ceil celu clamp clamp_max clamp_min clip copy cos cosh detach_ div elu eq erf erfc exp "
        "expm1 fill floor floor_divide fmod ge gelu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le "
        "leaky_relu lerp lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logical_and logical_not "
        "logical_or logical_xor lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg polar pow "
        "prelu reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus "
        "softsign sqrt square sub tan tanh threshold trunc where xlogy",
        rule=aten.pointwise,
        traits=Trait.BROADCASTS,
    ),
    *each("_to_copy contiguous detach to", rule=aten.pointwise, traits=Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS),
    Op("add", rule=aten.pointwise, traits=Trait.BROADCASTS | Trait.ADDS, bias_inputs=(0, 1)),
    *each("alias clone", rule=aten.pointwise, traits=Trait.KEEPS_ORDER | Trait.COPIES | Trait.BROADCASTS | Trait.HANDS_ON),
    Op("dropout", rule=aten.pointwise, traits=Trait.BROADCASTS | Trait.DROPS | Trait.HANDS_ON),
    *each("feature_dropout native_dropout", rule=aten.pointwise, traits=Trait.BROADCASTS | Trait.DROPS),
    *each(
        "_adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d "
        "max_pool2d_with_indices max_pool3d max_pool3d_with_indices upsample_bicubic2d upsample_bilinear2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest2d",
        rule=aten.pool,
    ),
    *each(
        "all amax amin any argmax argmin linalg_vector_norm logsumexp mean norm prod std sum var var_mean", rule=aten.reduce
    ),
    *each("repeat tile", rule=aten.repeat, traits=Trait.REPEATS),
    Op("repeat_interleave", rule=aten.repeat_interleave),
    *each("scatter scatter_add scatter_reduce", rule=aten.scatter),
    Op("select", rule=aten.select),
    Op("select_scatter", rule=aten.select_scatter),
    *each("diff topk", rule=aten.shorter_axis),
    Op("slice_scatter", rule=aten.slice_scatter),
    *each("narrow slice", rule=aten.sliced, traits=Trait.SLICES),
    *each("chunk split split_with_sizes split_with_sizes_copy", rule=aten.split, traits=Trait.SPLITS),
    Op("squeeze", rule=aten.squeeze, traits=Trait.KEEPS_ORDER),
    Op("stack", rule=aten.stack),
    *each("mT numpy_T t transpose", rule=aten.transpose, traits=Trait.TURNS),
    *each("tril triu", rule=aten.triangle),
    Op("unbind", rule=aten.unbind),
    Op("unflatten", rule=aten.unflatten),
    Op("unsqueeze", rule=aten.unsqueeze, traits=Trait.KEEPS_ORDER),
    *each("_unsafe_view reshape view view_copy", rule=aten.view, traits=Trait.KEEPS_ORDER | Trait.HANDS_ON),
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
