"""Operations that the compiler does not look into; products and attention in float32 where a CPU is faster so."""

import pytest
import torch
import torch.nn.functional as F

from titan_cpt.models.common import ops
from titan_cpt.models.common.layers import RotaryCausalAttention

ANGLES = torch.linspace(-4, 4, 24).reshape(4, 6)


@pytest.mark.parametrize("operation", [ops._cos_sin, ops._gelu, ops._copy], ids=["cos_sin", "gelu", "copy"])
def test_custom_operations_pass_torchs_opcheck(operation):
    """Schema, shapes of what is not computed, and gradients under tracing are those of the operation itself."""
    told = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    differentiable = operation is not ops._cos_sin
    found = torch.library.opcheck(operation, (ANGLES.clone().requires_grad_(differentiable),), test_utils=told)

    assert set(found.values()) == {"SUCCESS"}


def test_an_opaque_gelu_has_the_gradient_of_gelu():
    """x Phi(x), and by the product rule Phi(x) + x phi(x)."""
    x = ANGLES.double().requires_grad_()
    y = ops._gelu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    normal = torch.distributions.Normal(0.0, 1.0)

    torch.testing.assert_close(y, x * normal.cdf(x))
    torch.testing.assert_close(slope, normal.cdf(x) + x * normal.log_prob(x).exp())


def bf16_heads(positions):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, positions, 32, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("positions", "upcast"), [(128, True), (1024, False)])
def test_short_attention_is_trained_in_float32_and_gives_bfloat16(positions, upcast, monkeypatch):
    """Up to 8,192 positions x features of a head; longer sequences take the bf16 kernel of a CPU that has bfloat16."""
    monkeypatch.setattr(ops, "CPU_HAS_BFLOAT16", True)
    q_BNLH, k_BNLH, v_BNLH = bf16_heads(positions)
    attention = RotaryCausalAttention(rotary_width=8, rope_base=10_000.0)
    in_fp32 = F.scaled_dot_product_attention(q_BNLH.float(), k_BNLH.float(), v_BNLH.float(), is_causal=True)
    as_it_comes = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, is_causal=True)
    trained = attention.attend(q_BNLH, k_BNLH, v_BNLH)

    assert trained.dtype == torch.bfloat16
    assert torch.equal(trained, in_fp32.bfloat16() if upcast else as_it_comes)
    with torch.no_grad():
        assert torch.equal(attention.attend(q_BNLH, k_BNLH, v_BNLH), as_it_comes)


def test_short_attention_is_as_exact_as_bfloat16_can_hold():
    """Its gradients are no further from exact ones than rounding the exact ones does, by half as much again."""
    heads = bf16_heads(128)
    exact_heads = [x.detach().double().requires_grad_() for x in heads]
    grads = torch.autograd.grad(RotaryCausalAttention(rotary_width=8, rope_base=10_000.0).attend(*heads).sum(), heads)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*exact_heads, is_causal=True).sum(), exact_heads)

    for grad, right in zip(grads, exact, strict=True):
        rounding = (right.bfloat16().double() - right).norm()
        assert (grad.double() - right).norm() <= 1.5 * rounding + 1e-6 * right.norm()


# A CPU without products in bfloat16


@pytest.fixture
def without_bfloat16(monkeypatch):
    """This CPU, taken to have no products in bfloat16, whatever it has."""
    monkeypatch.setattr(ops, "CPU_HAS_BFLOAT16", False)


def bf16(*shape, seed):
    """Small whole numbers: bfloat16 and float32 hold their products and sums exactly, in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_layer_without_bfloat16_gives_the_numbers_of_torchs_own(bias, without_bfloat16):
    """Result and all gradients, in bfloat16, of an input with two leading dimensions; exact on whole numbers."""
    ours, torchs = ops.Linear(16, 8, bias=bias).bfloat16(), torch.nn.Linear(16, 8, bias=bias).bfloat16()
    for mine, its in zip(ours.parameters(), torchs.parameters(), strict=True):
        mine.data = its.data = bf16(*mine.shape, seed=mine.ndim)
    results = []
    for layer in (ours, torchs):
        x_BLD = bf16(2, 3, 16, seed=3).requires_grad_()
        y_BLD = layer(x_BLD)
        y_BLD.backward(bf16(2, 3, 8, seed=4))
        results.append([y_BLD, x_BLD.grad, *(weight.grad for weight in layer.parameters())])

    for mine, its in zip(*results, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, its)


def test_a_product_without_bfloat16_is_rounded_once(without_bfloat16):
    """256 + 1 + 1 is 258 added up in float32; bfloat16, rounding after each addition, would stay at 256."""
    row, ones = torch.tensor([[256.0, 1.0, 1.0]]).bfloat16(), torch.ones(3, 1).bfloat16()
    into = torch.empty(1, 1).bfloat16()
    ops.multiply(row, ones, out=into)

    assert ops.multiply(row, ones).item() == into.item() == 258
    assert ops.linear(row, ones.t()).item() == 258
    assert {ops.multiply(row, ones).dtype, ops.linear(row, ones.t()).dtype} == {torch.bfloat16}


def test_attention_without_bfloat16_is_that_of_float32_rounded(without_bfloat16):
    """Trained or not, however long."""
    heads = bf16_heads(1024)
    in_fp32 = F.scaled_dot_product_attention(*(x.float() for x in heads), is_causal=True).bfloat16()

    assert torch.equal(ops.attention(*heads, is_causal=True), in_fp32)
    with torch.no_grad():
        assert torch.equal(ops.attention(*heads, is_causal=True), in_fp32)


def test_float32_and_other_devices_are_left_to_torch(without_bfloat16):
    """Only bfloat16 on a CPU is replaced."""
    assert ops.multiplied_in_float32(torch.bfloat16, torch.device("cpu"))
    assert not ops.multiplied_in_float32(torch.float32, torch.device("cpu"))
    assert not ops.multiplied_in_float32(torch.bfloat16, torch.device("cuda"))


def test_a_weights_gradient_is_rounded_to_bfloat16_even_where_it_is_kept_in_float32(without_bfloat16):
    """As in the compute copy; autograd would not round it there."""
    layer = ops.Linear(16, 8).bfloat16()
    layer.weight.grad_dtype = torch.float32
    layer(torch.randn(64, 16).bfloat16()).square().sum().backward()

    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN multiplies float32 matrices, whatever CPU runs the test, until the test ends."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: True)
    ops.use_onednn(True)
    yield
    ops.use_onednn(False)


def products(x, weight, bias, grad):
    """A linear layer's output and its gradients, and the product of `multiply`, also into a given matrix."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = ops.linear(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    into = torch.empty(len(weight), x.shape[-1], dtype=x.dtype)
    product = ops.multiply(grad.flatten(0, -2).t(), x.flatten(0, -2), out=into)
    assert product is into
    return [*found, product, ops.multiply(grad.flatten(0, -2), weight)]


@pytest.mark.parametrize(("features", "outputs"), [(24, 56), (56, 24), (1, 3)])
def test_onednn_gives_a_linear_layers_products(onednn, features, outputs):
    """Values, gradients and strided operands, within float32's rounding of the same in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 9, features), (outputs, features), (outputs,), (2, 9, outputs)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]

    for found, exact in zip(products(*tensors), products(*(tensor.double() for tensor in tensors)), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_onednn_multiplies_only_plain_float32_on_request(onednn, monkeypatch):
    """Other dtypes keep torch's products, and all do after use_onednn(False) or where oneDNN is not faster."""
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    used = []
    monkeypatch.setattr(ops, "_onednn_product", lambda a, b, bias=None: used.append(a.dtype) or F.linear(a, b, bias))

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ops.linear(x.to(dtype), weight.to(dtype))
    assert used == [torch.float32]

    ops.use_onednn(False)
    ops.linear(x, weight)
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: False)
    ops.use_onednn(True)
    ops.linear(x, weight)
    assert used == [torch.float32]


def test_compiled_code_does_not_take_onednn(onednn):
    """torch.compile chooses the kernels of what it compiles; the same graph serves both settings."""
    graphs = []
    compiled = torch.compile(ops.linear, backend=lambda module, _: graphs.append(module) or module.forward)
    compiled(torch.randn(5, 7), torch.randn(3, 7))

    assert "mkldnn" not in graphs[0].code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_layer_saves_its_weight_and_not_its_input(dtype, without_bfloat16, onednn):
    """As torch's own layer; the gradient of the input is the same. Below it nothing is trained: no weight is saved."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=generator).to(dtype), torch.randn(4, 8, generator=generator).to(dtype)
    found = {}
    for trained in ("both", "x", "weight"):
        operands = [x.clone().requires_grad_(trained != "weight"), weight.clone().requires_grad_(trained != "x")]
        out = ops.linear(*operands)
        saved = [None if tensor is None else tuple(tensor.shape) for tensor in out.grad_fn.saved_tensors]
        assert saved == [None if trained == "x" else (2, 3, 8), None if trained == "weight" else (4, 8)]
        out.sum().backward()
        found[trained] = [operand.grad for operand in operands]

    assert torch.equal(found["x"][0], found["both"][0])
    assert torch.equal(found["weight"][1], found["both"][1])
