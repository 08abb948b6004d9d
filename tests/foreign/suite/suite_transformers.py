"""Small models of transformers and peft, made of their configurations."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from suite_base import CLASSES, case, loader, pictures, table, words
from torch import Tensor, nn

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {**SIZES, "vocab_size": 20, "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
DECODER = {**SIZES, "vocab_size": 20, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
           "pad_token_id": 0, "num_key_value_heads": 1}  # fmt: skip


class Classified(pl.LightningModule):
    """Takes the loss that the model computes of labels."""

    settings: dict[str, Any] = {}  # noqa: RUF012
    digits = 1e-10
    input = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.model = self.make()
        self.model.train()

    def make(self) -> nn.Module:
        raise NotImplementedError

    def train_dataloader(self) -> Any:
        return loader(words(), table()[1])

    def inputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {self.input: batch[0], "labels": batch[1]}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        output = self.model(**self.inputs(batch))
        self.log("loss", output.loss.detach(), on_epoch=True)
        return output.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Continued(Classified):
    """Predicts the next token, or the same ones behind a mask."""

    def inputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": batch[0], "labels": batch[0].clone()}


class Pictured(Classified):
    input = "pixel_values"
    size = 8

    def train_dataloader(self) -> Any:
        return loader(pictures(self.size), table()[1])


def made(model: str, config: str, **settings: Any) -> Any:
    def make(self: Any) -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


def add(name: str, base: type, model: str, config: str, settings: dict[str, Any], **body: Any) -> type:
    kind = type(name, (base,), {"make": made(model, config, **settings), "__module__": __name__, **body})
    globals()[name] = case(kind)
    return kind


ROUNDED = {"digits": 1e-4}  # norms, rotations or masks in float32 whatever comes in
ROUGH = {"rough": True}  # finite differences meet kinks, or norms of vectors that begin at zero

add("Bert", Classified, "BertForSequenceClassification", "BertConfig", TEXT)
add("BertMasked", Continued, "BertForMaskedLM", "BertConfig", TEXT)
add("Roberta", Classified, "RobertaForSequenceClassification", "RobertaConfig", TEXT)
add("Electra", Classified, "ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 8})
add("Albert", Classified, "AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 4})
add("Distilbert", Classified, "DistilBertForSequenceClassification", "DistilBertConfig",
    {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 20, "max_position_embeddings": 16,
     "num_labels": CLASSES})  # fmt: skip
add("Gpt2", Continued, "GPT2LMHeadModel", "GPT2Config",
    {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 16, "bos_token_id": 1,
     "eos_token_id": 2, "use_cache": False}, digits=1e-6, **ROUGH)  # fmt: skip
add("Opt", Continued, "OPTForCausalLM", "OPTConfig",
    {**DECODER, "ffn_dim": 8, "word_embed_proj_dim": 8, "layerdrop": 0.0}, digits=1e-7)  # fmt: skip
add("Llama", Continued, "LlamaForCausalLM", "LlamaConfig", {**DECODER, "use_cache": False}, **ROUNDED)
add("Qwen", Continued, "Qwen2ForCausalLM", "Qwen2Config", DECODER, **ROUNDED)
add("Mamba", Continued, "MambaForCausalLM", "MambaConfig",
    {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 2, "pad_token_id": 0,
     "bos_token_id": 1, "eos_token_id": 2}, **ROUNDED)  # fmt: skip
add("T5", Continued, "T5ForConditionalGeneration", "T5Config",
    {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20,
     "decoder_start_token_id": 0}, **ROUNDED)  # fmt: skip
add("Bart", Continued, "BartForConditionalGeneration", "BartConfig",
    {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
     "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20,
     "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
     "decoder_start_token_id": 2, "forced_eos_token_id": 2})  # fmt: skip
add("Vit", Pictured, "ViTForImageClassification", "ViTConfig", {**SIZES, **IMAGE})
add("Deit", Pictured, "DeiTForImageClassification", "DeiTConfig", {**SIZES, **IMAGE}, **ROUGH)
add("Dinov2", Pictured, "Dinov2ForImageClassification", "Dinov2Config",
    {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, **IMAGE})  # fmt: skip
add("Swin", Pictured, "SwinForImageClassification", "SwinConfig",
    {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "mlp_ratio": 1.0, **IMAGE,
     "patch_size": 2})  # fmt: skip
add("Resnet", Pictured, "ResNetForImageClassification", "ResNetConfig",
    {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic",
     "num_labels": CLASSES}, size=16, **ROUGH)  # fmt: skip
add("Convnext", Pictured, "ConvNextForImageClassification", "ConvNextConfig",
    {"num_channels": 1, "patch_size": 2, "hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2,
     "num_labels": CLASSES})  # fmt: skip
add("Mobilenet", Pictured, "MobileNetV2ForImageClassification", "MobileNetV2Config",
    {"num_channels": 1, "image_size": 16, "depth_multiplier": 0.1, "num_labels": CLASSES},
    size=32, **ROUGH)  # fmt: skip


class Spoken(Classified):
    def train_dataloader(self) -> Any:
        return loader(torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(4)), words(4))

    def inputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"input_features": batch[0], "labels": batch[1]}


add("Whisper", Spoken, "WhisperForConditionalGeneration", "WhisperConfig",
    {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
     "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20, "num_mel_bins": 4,
     "max_source_positions": 4, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
     "decoder_start_token_id": 1, "apply_spec_augment": False})  # fmt: skip


class Matched(Classified):
    def train_dataloader(self) -> Any:
        return loader(words(), pictures())

    def inputs(self, batch: list[Tensor]) -> dict[str, Any]:
        return {"input_ids": batch[0], "pixel_values": batch[1], "return_loss": True}


add("Clip", Matched, "CLIPModel", "CLIPConfig",
    {"text_config": {**SIZES, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1,
                     "pad_token_id": 0},
     "vision_config": {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}, "projection_dim": 4})  # fmt: skip


class Adapted(Continued):
    """Low-rank adapters, beside frozen weights."""

    digits, rough = 1e-6, True  # slopes as small as the rounding of what GPT-2 computes in float32

    def make(self) -> nn.Module:
        import peft

        base = made("GPT2LMHeadModel", "GPT2Config", n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16,
                    bos_token_id=1, eos_token_id=2)(self)  # fmt: skip
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@case
class Lora(Adapted):
    pass


@case
class PromptTuned(Adapted):
    """Virtual tokens before the frozen model."""

    def make(self) -> nn.Module:
        import peft

        base = made("GPT2LMHeadModel", "GPT2Config", n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16,
                    bos_token_id=1, eos_token_id=2)(self)  # fmt: skip
        return peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@case
class BertProbed(Classified):
    """Averages all hidden states of a frozen model, for a head of its own."""

    make = made("BertModel", "BertConfig", **TEXT)

    def __init__(self) -> None:
        super().__init__()
        self.model.requires_grad_(False)
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = torch.stack(self.model(input_ids=batch[0], output_hidden_states=True).hidden_states)
        assert len(hidden) == 2
        return F.cross_entropy(self.head(hidden.mean((0, 2))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-3)
