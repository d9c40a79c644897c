"""MiniGPT-v2 and NExT-Chat in PyTorch, built of transformers' towers and its Llama, which has no classes of theirs.

They are what a user of PyTorch would write today: the original code is of transformers 4.31, and runs no other.
Source: Vision-CAIR/MiniGPT-4:minigpt4/models/minigpt_v2.py, minigpt_base.py at d94738a;
NExT-ChatV/NExT-Chat:mllm/models/nextchat/nextchat_base.py at 1e6c20f.
"""

from types import SimpleNamespace

import torch
import transformers
from torch import nn
from torch.nn import functional

from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.weights.llava import config_to_json, text_to_json
from medcg_jax.train.losses import TERMS


class MiniGPTv2(nn.Module):
    """EVA, whose neighbouring patches become one token each, a dense layer, and Llama."""

    def __init__(self, vision, language_model, *, patches_per_token: int, image_token_id: int):
        super().__init__()
        self.vision, self.language_model = vision, language_model
        self.patches_per_token, self.image_token_id = patches_per_token, image_token_id
        width = patches_per_token * vision.config.hidden_size
        self.projector = nn.Linear(width, language_model.config.hidden_size, dtype=language_model.dtype)

    @classmethod
    def random(cls, config: MiniGPTv2Config, dtype, attention: str) -> "MiniGPTv2":
        seen, options = config.vision, dict(dtype=dtype, attn_implementation=attention)
        vision = transformers.Blip2VisionConfig(
            hidden_size=seen.embed_dim, intermediate_size=seen.mlp_dim, num_hidden_layers=seen.num_layers,
            num_attention_heads=seen.num_heads, image_size=seen.image_size_px, patch_size=seen.patch_size_px,
            hidden_act="gelu", layer_norm_eps=seen.norm_eps, qkv_bias=True,
        )  # fmt: skip
        llama = transformers.LlamaConfig.from_dict(text_to_json(config.text))
        tower = transformers.Blip2VisionModel._from_config(vision, **options)
        tower.post_layernorm.eps = seen.out_norm_eps
        model = transformers.LlamaForCausalLM._from_config(llama, **options)
        return cls(
            tower, model, patches_per_token=config.patches_per_token, image_token_id=config.image_token_id
        )  # fmt: skip

    @property
    def generation_config(self):
        return self.language_model.generation_config

    def gradient_checkpointing_enable(self) -> None:
        self.language_model.gradient_checkpointing_enable()

    def embedded(self, input_ids, pixel_values):
        """float[B, T, D]: the decoder's input, image features in place of image tokens."""
        patches = self.vision(pixel_values=pixel_values).last_hidden_state[:, 1:]
        features = self.projector(patches.reshape(len(patches), -1, self.projector.in_features))
        is_image = (input_ids == self.image_token_id)[..., None]
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image[..., 0], 0))
        return embeds.masked_scatter(is_image, features.to(embeds.dtype))

    def forward(self, input_ids, attention_mask, pixel_values, labels=None):
        embeds = self.embedded(input_ids, pixel_values)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)

    def generate(self, input_ids, attention_mask, pixel_values, **options):
        """int[B, T + new], as transformers' generate of models that take ids."""
        embeds = self.embedded(input_ids, pixel_values)
        new = self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
        return torch.cat([input_ids, new], dim=1)


class NextChat(transformers.LlavaForConditionalGeneration):
    """LLaVA with boxes in place of `<boxes>`, and boxes decoded from the hidden states at `<at>`; no masks."""

    def __init__(self, config):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.loc_encoder = nn.Sequential(nn.Linear(4, width // 2), nn.ReLU(), nn.Linear(width // 2, width))
        self.loc_decoder = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 4))

    @classmethod
    def random(cls, config: NextChatConfig, dtype, attention: str) -> "NextChat":
        like_llava = SimpleNamespace(
            vision=config.vision, text=config.text, image_token_id=config.image_token_id,
            num_image_tokens=config.num_image_tokens, pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id, projector_activation="gelu", projector_bias=True,
        )  # fmt: skip
        described = transformers.LlavaConfig.from_dict(config_to_json(like_llava, "float32"))  # type: ignore[arg-type]
        described.box_token_id = config.box_token_id
        return cls._from_config(described, dtype=dtype, attn_implementation=attention)

    def forward(
        self, input_ids, attention_mask, pixel_values, labels=None, boxes=None, box_weights=None, at_positions=None,
        at_boxes=None, at_weights=None,
    ):  # fmt: skip
        """Without `labels` as LLaVA's; with them `loss` is the sum of `train.losses.box_terms`, weighted by `TERMS`."""
        if labels is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        is_image = (input_ids == self.config.image_token_id)[..., None]
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image[..., 0], 0))
        features = self.get_image_features(pixel_values=pixel_values).pooler_output
        embeds = embeds.masked_scatter(is_image, torch.cat(list(features)).to(embeds.dtype))
        given = box_weights > 0
        is_box = (input_ids == self.config.box_token_id)[..., None]
        embeds = embeds.masked_scatter(is_box, self.loc_encoder(boxes[given]).to(embeds.dtype))
        hidden = self.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        row, slot = torch.nonzero(at_weights > 0, as_tuple=True)
        at, target = hidden[row, at_positions[row, slot].long()].float(), at_boxes[row, slot]
        decoded, redecoded = self.loc_decoder(at), self.loc_decoder(self.loc_encoder(boxes[given]))
        ordered = (decoded[:, 2:] >= decoded[:, :2]).all(dim=-1)
        ce = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        terms = {
            "ce": ce,
            "l1": mean((decoded - target).abs().mean(dim=-1)),
            "giou": mean(1 - generalized_iou(decoded[ordered], target[ordered])),
            "cycle1": mean((self.loc_encoder(decoded) - at).square().mean(dim=-1)),
            "cycle2": mean((redecoded - boxes[given]).abs().mean(dim=-1)),
        }
        return SimpleNamespace(loss=sum(TERMS[name] * term for name, term in terms.items()), logits=logits)


def mean(values):
    """The mean; 0 of nothing."""
    return values.sum() / max(values.numel(), 1)


def generalized_iou(boxes, others):
    """float[N] generalised IoU of boxes[N, 4] with others[N, 4]: left, top, right, bottom."""
    inner = area(torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:]))
    outer = area(torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:]))
    union = area(boxes[:, :2], boxes[:, 2:]) + area(others[:, :2], others[:, 2:]) - inner
    return inner / union - (outer - union) / outer


def area(low, high):
    return (high - low).clamp(min=0).prod(dim=-1)
