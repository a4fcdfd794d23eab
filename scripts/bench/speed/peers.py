"""The other trainers: each loads the same weights and batches, and takes a step as its authors wrote it.

hf_trainer   transformers' Trainer
litgpt       litgpt's model under Lightning's Fabric, as in litgpt/pretrain.py; the whole model compiled
plain        a loop like nanoGPT's: autocast, fused AdamW, the whole model compiled
torchtitan   torchtitan's Llama, compiled block by block; the step in torchtitan's order

On CUDA each has the settings that its makers recommend for a GPU: fused AdamW, TF32 for what stays in float32 (in
bfloat16 races; float32 races are in float32 throughout), batches copied from pinned memory without waiting.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from queue import Queue
from typing import Any

import serve

wanted = serve.arguments()

import numpy as np  # noqa: E402  # after the allocator setting
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

folder, shape, device = Path(wanted["folder"]), wanted["shape"], wanted["device"]
half, on_gpu = wanted["precision"] == "bfloat16", device == "cuda"
if on_gpu:
    torch.set_float32_matmul_precision("high" if half else "highest")
else:
    torch.set_num_threads(1)
ADAMW = {"lr": wanted["lr"], "betas": (0.9, 0.95), "eps": 1e-8}


def batches() -> Tensor:
    """All batches, int64 [steps, B, L + 1], in pinned memory on a machine with a GPU."""
    rows = torch.from_numpy(np.load(folder / "batches.npy"))
    return rows.pin_memory() if on_gpu else rows


def split(rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step, int64 [B, L] each, on the device."""
    batch = rows[number].to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def precision() -> Any:
    """Autocast to bfloat16, in a bfloat16 race."""
    return torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext()


def weights() -> dict[str, Tensor]:
    """The initial weights, by Hugging Face's names."""
    return load_file(folder / "weights.safetensors")


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for vectors, as in every trainer."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def hf_config() -> Any:
    """The shape as a transformers configuration."""
    from transformers import GPTNeoXConfig, LlamaConfig

    common = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["width"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["mlp_width"],
        "max_position_embeddings": wanted["seq_len"],
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if wanted["family"] == "llama":
        return LlamaConfig(num_key_value_heads=shape["kv_heads"], rms_norm_eps=1e-5, **common)
    return GPTNeoXConfig(rotary_pct=0.25, layer_norm_eps=1e-5, hidden_act="gelu", **common)


def hf_model() -> Any:
    """transformers' model with the initial weights."""
    from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

    found = weights()
    with torch.device(device):
        model = LlamaForCausalLM(hf_config()) if wanted["family"] == "llama" else GPTNeoXForCausalLM(hf_config())
    if wanted["family"] != "llama" and "lm_head.weight" in model.state_dict():
        found["lm_head.weight"] = found.pop("embed_out.weight")
    missing = model.load_state_dict(found, strict=False)
    assert missing == ([], []), missing
    return model


def hf_trainer() -> None:
    """transformers' Trainer has the loop, so it runs in a thread and waits before each step for a request."""
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    serve.wait_for_load()
    rows = torch.from_numpy(np.load(folder / "batches.npy")).flatten(0, 1)  # its data loader pins batches
    requests: Queue[int] = Queue()
    answers: Queue[Tensor | BaseException] = Queue()

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, at: int) -> dict[str, Tensor]:
            return {"input_ids": rows[at, :-1], "labels": rows[at, 1:], "shift_labels": rows[at, 1:]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Gate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            requests.get()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            answers.put(trainer.last_loss)

    options = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=wanted["batch"],
        num_train_epochs=1,
        learning_rate=wanted["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=half,
        tf32=half if on_gpu else None,
        use_cpu=not on_gpu,
        torch_compile=wanted["compiled"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = InOrder(model=hf_model(), args=options, train_dataset=Rows(), callbacks=[Gate()])

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=train, daemon=True).start()

    def step(_: int) -> Tensor:
        requests.put(1)
        answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    serve.serve(step, device)


def litgpt() -> None:
    """litgpt/pretrain.py's step: Fabric, the whole model compiled, chunked cross-entropy, fused AdamW."""
    import lightning as L
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    llama = wanted["family"] == "llama"
    config = Config(
        name="race",
        block_size=wanted["seq_len"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["width"],
        n_query_groups=shape["kv_heads"] if llama else shape["heads"],
        intermediate_size=shape["mlp_width"],
        padded_vocab_size=shape["vocab_size"],
        vocab_size=shape["vocab_size"],
        rotary_percentage=1.0 if llama else 0.25,
        parallel_residual=not llama,
        bias=not llama,
        norm_class_name="RMSNorm" if llama else "LayerNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP",
    )
    serve.wait_for_load()
    fabric = L.Fabric(accelerator=device, devices=1, precision="bf16-mixed" if half else "32-true")
    with torch.device(device):
        model = GPT(config)
    state: dict[str, Tensor] = {}
    if llama:
        copy_weights_hf_llama(config, {}, state, weights())
    else:
        copy_weights_gpt_neox(config, state, weights())
    model.load_state_dict(state, strict=True)
    model = torch.compile(model) if wanted["compiled"] else model
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(groups(model), fused=True, **ADAMW))
    rows = batches()

    def step(number: int) -> Tensor:
        inputs, targets = split(rows, number)
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    serve.serve(step, device)


class PlainBlock(nn.Module):
    """A GPT-NeoX block in nanoGPT's style, with Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        width, hidden = shape["width"], shape["mlp_width"]
        self.input_layernorm = nn.LayerNorm(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(width, hidden), "dense_4h_to_h": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        B, L, D = x.shape
        heads = shape["heads"]
        qkv = self.attention["query_key_value"](self.input_layernorm(x)).view(B, L, heads, 3 * D // heads)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, D)
        fed = self.mlp["dense_4h_to_h"](F.gelu(self.mlp["dense_h_to_4h"](self.post_attention_layernorm(x))))
        return x + self.attention["dense"](y) + fed


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1).to(x.dtype)


class PlainGPT(nn.Module):
    """The whole model with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt_neox = nn.ModuleDict(
            {
                "embed_in": nn.Embedding(shape["vocab_size"], shape["width"]),
                "layers": nn.ModuleList(PlainBlock() for _ in range(shape["layers"])),
                "final_layer_norm": nn.LayerNorm(shape["width"]),
            }
        )
        self.embed_out = nn.Linear(shape["width"], shape["vocab_size"], bias=False)
        turned = shape["width"] // shape["heads"] // 4
        angles = torch.outer(torch.arange(wanted["seq_len"]), 10000 ** (-torch.arange(0, turned, 2) / turned))
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.gpt_neox["embed_in"](tokens)
        for block in self.gpt_neox["layers"]:
            x = block(x, self.cos, self.sin)
        logits = self.embed_out(self.gpt_neox["final_layer_norm"](x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def plain() -> None:
    """nanoGPT/train.py's step."""
    serve.wait_for_load()
    with torch.device(device):
        model = PlainGPT()
    model.load_state_dict(weights(), strict=True)
    optimizer = torch.optim.AdamW(groups(model), fused=True, **ADAMW)
    run: Callable[..., Tensor] = torch.compile(model) if wanted["compiled"] else model
    rows = batches()

    def step(number: int) -> Tensor:
        inputs, targets = split(rows, number)
        with precision():
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    serve.serve(step, device)


def torchtitan() -> None:
    """torchtitan/train.py's step on one process: autocast, blocks and loss compiled, clipping, fused AdamW."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    sizes = TransformerModelArgs(
        dim=shape["width"],
        n_layers=shape["layers"],
        n_heads=shape["heads"],
        n_kv_heads=shape["kv_heads"],
        multiple_of=shape["mlp_width"],  # it rounds 8/3 of the width up to a multiple of this
        vocab_size=shape["vocab_size"],
        norm_eps=1e-5,
        max_seq_len=wanted["seq_len"],
    )
    serve.wait_for_load()
    with torch.device(device):
        model = Transformer(sizes)
    model.load_state_dict(Llama3StateDictAdapter(sizes, None).from_hf(weights()), strict=True)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))

    loss_of = cross_entropy
    if wanted["compiled"]:
        for name, block in model.layers.named_children():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
        loss_of = torch.compile(cross_entropy)
    optimizer = torch.optim.AdamW(groups(model), fused=True, **ADAMW)
    rows = batches()

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        inputs, targets = split(rows, number)
        with precision():
            loss = loss_of(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    serve.serve(step, device)


STEPS = {"hf_trainer": hf_trainer, "litgpt": litgpt, "plain": plain, "torchtitan": torchtitan}
try:
    STEPS[wanted["kind"]]()
except ImportError as error:
    serve.decline("not installed", str(error))
except torch.OutOfMemoryError as error:
    serve.decline("out of memory", str(error).splitlines()[0])
sys.stdout.flush()
