"""The gated feed-forward layer: two products of one input, an activation, and a third product."""
from pallas_kernels.gated_mlp.op import gated_mlp, gated_product
from pallas_kernels.gated_mlp.reference import ACTIVATIONS, Activation, ClampedGlu, gated, gated_mlp_reference, gated_product_reference
