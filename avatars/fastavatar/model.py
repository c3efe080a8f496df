"""FastAvatar's two networks: a decoder from w to the template's residuals, an encoder from one picture to w."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.fastavatar.avatar import FastAvatar, shared_head
from avatars.fastavatar.config import FastAvatarConfig
from avatars.fastavatar.faces import FROZEN
from avatars.fastavatar.surface import LocalGaussians, seats_of
from avatars.files import write_whole

__all__ = ["Decoded", "Decoder", "Encoder", "fingerprint", "read_network", "save_network"]


@dataclass
class Decoded:
    """What w says of B people: their Gaussians, and the identity code (B, I) of the head that carries them."""

    local: LocalGaussians
    identity: Tensor

    def __getitem__(self, person: int) -> Decoded:
        return Decoded(self.local[person], self.identity[person])


class Decoder(nn.Module):
    """w to residuals of every Gaussian of the template (paper section 3.2; the authors' "Hypernet").

    The template's log-scales, quaternions, opacity logits and harmonics get residuals as they are. The position is
    `offset · tanh(atanh(template / offset) + residual)` from the triangle: with a template that sits on its triangles
    this is the authors' `0.1 · tanh(residual)`, and a fitted one (ours) starts where its hair is.
    A linear layer predicts the head's identity code from w (ours), so that no tracking is needed at test time.

    The template and the embeddings are parameters that a training may leave as they are.
    """

    def __init__(self, config: FastAvatarConfig, count: int, inherited: FastAvatar | None = None) -> None:
        """A decoder that gives the template for every w.

        Args:
            config: its shape.
            count: Gaussians N.
            inherited: the template; without one all its values are zeros, to be set or loaded.
        """
        super().__init__()
        self.config = config
        width, coefficients = config.width, (config.sh_degree + 1) ** 2
        self.sizes = {
            "offsets": 3,
            "quats": 4,
            "log_scales": 3,
            "opacities": 1,
            "colors": 3 * coefficients,
        }
        self.template = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(count, size)) for name, size in self.sizes.items()}
        )
        self.mean_identity = nn.Parameter(torch.zeros(config.identity_dim))
        self.embedding = nn.Parameter(torch.zeros(count, config.embedding))
        # The first layer sees w and the embedding side by side; in two parts, w is looked at once and not N times.
        self.from_latent = nn.Linear(config.latent, width)
        self.from_embedding = nn.Linear(config.embedding, width, bias=False)
        self.trunk = nn.ModuleList(nn.Linear(width, width) for _ in range(config.layers - 1))
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, size))
                for name, size in self.sizes.items()
            }
        )
        self.identity = nn.Linear(config.latent, config.identity_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, gain=config.gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if inherited is not None:
            self.inherit(inherited)

    @torch.no_grad()
    def inherit(self, template: FastAvatar) -> None:
        """Takes over a template, and its posed places as the first three numbers of the embeddings.

        Raises:
            UserError: it has another layout.
        """
        config = self.config
        same = template.head == config.head and template.uv_resolution == config.uv_resolution
        if not same or len(template) != len(self.embedding):
            raise UserError(
                f"The template has {len(template)} Gaussians of the head {template.head!r} with uv_resolution "
                f"{template.uv_resolution} and the recipe asks for {config.head!r} with {config.uv_resolution}; make "
                "the template with the recipe's layout, or change --model.uv-resolution."
            )
        if template.local.colors.shape[1] != (config.sh_degree + 1) ** 2:
            raise UserError(
                f"The template has {template.local.colors.shape[1]} harmonics a colour and the recipe asks for degree "
                f"{config.sh_degree}; change --model.sh-degree."
            )
        for name, values in vars(template.local).items():
            self.template[name].copy_(values.reshape(len(template), -1))
        edge = self.config.offset * (1 - 1e-3)
        self.template["offsets"].copy_((self.template["offsets"].clamp(-edge, edge) / config.offset).atanh())
        self.mean_identity.copy_(template.identity)
        places = template.gaussians(torch.zeros(template.expression_length)).means
        low, high = places.amin(0), places.amax(0)
        self.embedding[:, :3].copy_((places - low) / (high - low))
        nn.init.normal_(self.embedding[:, 3:], std=0.02)

    def forward(self, latent: Tensor) -> Decoded:
        """People (B) from their w (B, d)."""
        h = self.from_embedding(self.embedding) + self.from_latent(latent)[:, None]  # (B, N, width)
        h = h.relu_()
        for layer in self.trunk:
            h = layer(h).relu_()
        values = {name: head(h) + self.template[name] for name, head in self.heads.items()}
        people, count = h.shape[:2]
        local = LocalGaussians(
            offsets=self.config.offset * values["offsets"].tanh(),
            quats=values["quats"],
            log_scales=values["log_scales"],
            opacities=values["opacities"][..., 0],
            colors=values["colors"].reshape(people, count, -1, 3),
        )
        return Decoded(local, self.head_of(latent))

    def head_of(self, latent: Tensor) -> Tensor:
        """Identity codes (B, I) of the heads that carry people, from their w (B, d)."""
        return self.mean_identity + self.identity(latent)

    def avatar(self, latent: Tensor, expression_kind: str, network: str, **more: Any) -> FastAvatar:
        """The person of one w (d,), ready to be driven. One forward pass."""
        with torch.no_grad():
            made = self(latent[None].to(self.embedding))[0]
        return FastAvatar(
            made.local,
            made.identity,
            head=self.config.head,
            uv_resolution=self.config.uv_resolution,
            expression_kind=expression_kind,
            latent=latent,
            network=network,
            **more,
        )


class Encoder(nn.Module):
    """One picture to w (paper section 3.3): a backbone, and an MLP with BatchNorm behind it.

    A frozen face recogniser's embedding (dlib 128, ArcFace 512) comes as its unit vector; a timm network sees the crop
    itself and is trained with us.
    """

    def __init__(self, config: FastAvatarConfig) -> None:
        """An untrained encoder; frozen backbones are no part of it.

        Raises:
            UserError: timm has no network of that name.
        """
        super().__init__()
        self.config = config
        self.backbone: nn.Module | None = None
        if config.backbone in FROZEN:
            width = FROZEN[config.backbone]
        else:
            import timm

            try:
                seen: Any = timm.create_model(config.backbone, pretrained=False, num_classes=0)
            except RuntimeError as error:
                raise UserError(
                    f"--model.backbone {config.backbone!r} is neither {' nor '.join(map(repr, FROZEN))} nor a network "
                    "of timm."
                ) from error
            self.backbone, width = seen, seen.num_features
        layers: list[nn.Module] = []
        for number, wide in enumerate(config.hidden):
            layers += [nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU()]
            if number < 2:
                layers.append(nn.Dropout(config.dropout))
            width = wide
        self.mlp = nn.Sequential(*layers, nn.Linear(width, config.latent))
        self.temperature = nn.Parameter(
            torch.ones(1)
        )  # DeepSpeed cannot broadcast a number without a dimension

    def forward(self, seen: Tensor) -> Tensor:
        """Latents (B, d) from crops (B, 3, S, S) in [0, 1], or from a frozen backbone's embeddings (B, D)."""
        return self.temperature * self.mlp(self.features(seen))

    def features(self, seen: Tensor) -> Tensor:
        """What the backbone makes of the pictures, of unit length where it is a frozen one."""
        if self.backbone is None:
            return nn.functional.normalize(seen, dim=-1)
        # Processors and tensor cores convolve faster with the channels last, once the weights lie so, too.
        return self.backbone(((seen - 0.4) / 0.25).contiguous(memory_format=torch.channels_last))


def seated(config: FastAvatarConfig) -> int:
    """How many Gaussians a layout has."""
    return len(seats_of(shared_head(config.head), config.uv_resolution))


def fingerprint(decoder: Decoder) -> str:
    """Tells decoders apart: latents of one mean nothing to another. Changes with any weight."""
    digest = hashlib.sha256()
    for name, value in sorted(decoder.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_network(
    folder: Path,
    method: str,
    decoder: Decoder,
    encoder: Encoder | None,
    provenance: dict[str, Any],
    people: dict[str, Tensor] | None = None,
) -> None:
    """Writes `model.safetensors` and, last, `model.json`.

    Args:
        folder: made where it is not there.
        method: "fastavatar" for a whole model, "fastavatar-decoder" for the first half.
        decoder: with the template in it.
        encoder: None for a decoder alone.
        provenance: with `expression_kind`.
        people: learned w (d,) by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    if encoder is not None:
        state |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    if people:
        state["people"] = torch.stack(list(people.values()))
    kept = {
        name: value.detach().cpu().clone().contiguous().float() if value.is_floating_point() else value.cpu()
        for name, value in state.items()
    }
    save_file(kept, folder / "model.safetensors")
    described = {
        "method": method,
        "config": (encoder or decoder).config.to_json(),
        "gaussians": len(decoder.embedding),
        "network": fingerprint(decoder),
        "people": list(people or {}),
        "provenance": provenance,
    }
    write_whole(folder / "model.json", json.dumps(described, indent=1) + "\n")


def read_network(
    folder: str | Path,
) -> tuple[Decoder, Encoder | None, dict[str, Any], dict[str, Tensor]]:
    """What `save_network` wrote: decoder, encoder where there is one, `model.json`, learned w by name.

    Raises:
        UserError: no such model, one of another method, or files that do not belong together.
    """
    folder = Path(folder)
    path = folder / "model.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no trained FastAvatar (model.json and model.safetensors); name an export."
        )
    told = json.loads(path.read_text())
    if told.get("method") not in ("fastavatar", "fastavatar-decoder"):
        raise UserError(f"{path} is of the method {told.get('method')!r}, not of FastAvatar.")
    config = FastAvatarConfig.from_json(told["config"])
    decoder = Decoder(config, told["gaussians"])
    encoder = Encoder(config) if told["method"] == "fastavatar" else None
    state = load_file(folder / "model.safetensors")
    table = state.pop("people", torch.zeros(0))
    whole = nn.ModuleDict({"decoder": decoder} | ({} if encoder is None else {"encoder": encoder}))
    try:
        whole.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder / 'model.safetensors'} does not fit its model.json; export it again."
        ) from error
    people = dict(zip(told["people"], table, strict=True))
    return decoder, encoder, told, people
