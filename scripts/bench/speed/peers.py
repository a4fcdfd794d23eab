"""The other trainers: each loads the same weights and batches, and takes a step as its authors wrote it.

hf_trainer   transformers' Trainer
litgpt       litgpt's model under Lightning's Fabric, as in litgpt/pretrain.py; the whole model compiled
plain        a loop like nanoGPT's: autocast, fused AdamW, the whole model compiled
torchtitan   torchtitan's Llama, compiled block by block; the step in torchtitan's order
gemm         a matrix product, the reference for MFU
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

torch.set_num_threads(1)
folder, shape = Path(wanted["folder"]), wanted["shape"]
half = wanted["precision"] == "bfloat16"
ADAMW = {"lr": wanted["lr"], "betas": (0.9, 0.95), "eps": 1e-8}


def batches() -> Tensor:
    """All batches, int64 [steps, B, L + 1]."""
    return torch.from_numpy(np.load(folder / "batches.npy"))


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
    if wanted["family"] == "llama":
        model = LlamaForCausalLM(hf_config())
    else:
        model = GPTNeoXForCausalLM(hf_config())
        if "lm_head.weight" in model.state_dict():
            found["lm_head.weight"] = found.pop("embed_out.weight")
    missing = model.load_state_dict(found, strict=False)
    assert missing == ([], []), missing
    return model


def hf_trainer() -> None:
    """transformers' Trainer has the loop, so it runs in a thread and waits before each step for a request."""
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = batches().flatten(0, 1)
    requests: Queue[int] = Queue()
    answers: Queue[Tensor] = Queue()

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
        use_cpu=True,
        torch_compile=wanted["compiled"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = InOrder(model=hf_model(), args=options, train_dataset=Rows(), callbacks=[Gate()])
    threading.Thread(target=trainer.train, daemon=True).start()

    def step(_: int) -> Tensor:
        requests.put(1)
        return answers.get()

    serve.serve(step)


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
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if half else "32-true")
    model, state = GPT(config), {}
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
        logits = model(rows[number, :, :-1].contiguous())
        loss = chunked_cross_entropy(logits, rows[number, :, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    serve.serve(step)


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
    model = PlainGPT()
    model.load_state_dict(weights(), strict=True)
    optimizer = torch.optim.AdamW(groups(model), fused=True, **ADAMW)
    run: Callable[..., Tensor] = torch.compile(model) if wanted["compiled"] else model
    rows = batches()

    def step(number: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
            loss = run(rows[number, :, :-1].contiguous(), rows[number, :, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    serve.serve(step)


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
        vocab_size=shape["vocab_size"],
        norm_eps=1e-5,
        max_seq_len=wanted["seq_len"],
    )
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
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
            loss = loss_of(model(rows[number, :, :-1].contiguous()), rows[number, :, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    serve.serve(step)


def gemm() -> None:
    """A step is one matrix product of 2048^3."""
    a = torch.randn(2048, 2048).to(torch.bfloat16 if half else torch.float32)
    serve.serve(lambda _: (a @ a)[0, 0])


{"hf_trainer": hf_trainer, "litgpt": litgpt, "plain": plain, "torchtitan": torchtitan, "gemm": gemm}[wanted["kind"]]()
sys.stdout.flush()
