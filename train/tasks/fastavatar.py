"""Training FastAvatar: the decoder with a w for each person, then the encoder that finds w in one picture."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.fastavatar import (
    FastAvatar,
    FastAvatarConfig,
    FastAvatarDecoderConfig,
    FastAvatarEncoderConfig,
    place,
    seats_of,
    shared_head,
)
from avatars.fastavatar.faces import FROZEN, crops, face_boxes, recogniser
from avatars.fastavatar.method import FastAvatarMethod
from avatars.fastavatar.model import Decoded, Decoder, Encoder, read_network, save_network, seated
from avatars.rasterize import rasterize
from shards import Manifest
from train.config import LossConfig, TrainConfig
from train.fits.fastavatar import first_look
from train.losses import PictureLoss
from train.task import Batch, check_codes, check_head, check_size, of_kind

__all__ = ["FastAvatarDecoderTask", "FastAvatarEncoderTask"]

REMEMBERED = 200_000
"""Pictures whose frozen embedding a rank keeps."""


class Drawn(nn.Module):
    """What both trainings share: pictures of decoded people, and how far they are from the true ones."""

    config: FastAvatarDecoderConfig | FastAvatarEncoderConfig

    def __init__(
        self, config: FastAvatarDecoderConfig | FastAvatarEncoderConfig, loss: LossConfig, decoder: Decoder
    ) -> None:
        super().__init__()
        self.config, self.loss, self.decoder = config, PictureLoss(loss), decoder

    def picture_losses(
        self, made: Decoded, identity: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The people on heads of `identity` (B, I) with the batch's expressions, from the batch's cameras."""
        head = shared_head(self.config.head, str(identity.device))
        seats = seats_of(head, self.config.uv_resolution).to(identity.device)
        posed = seats.posed(head.vertices(identity, batch["expression"]))
        targets = batch["target_images"]  # (B, v, 3, H, W)
        pictures, alphas = [], []
        for person in range(len(targets)):
            gaussians = place(made[person].local, *(values[person] for values in posed))
            cameras = Cameras(batch["target_K"][person], batch["target_world_to_camera"][person])
            rendering = rasterize(gaussians, cameras, targets.shape[-2:])
            pictures.append(rendering.image)
            alphas.append(rendering.alpha)
        predictions, wanted = torch.cat(pictures), targets.flatten(0, 1)
        loss, parts = self.loss(predictions, wanted, batch["progress"])
        if self.config.matte_weight:
            # Over black, dark hair that is not drawn costs a picture next to nothing; its matte sees it.
            matte = (torch.cat(alphas) - batch["target_masks"].flatten(0, 1)).abs().mean()
            loss = loss + self.config.matte_weight * matte
            parts["matte"] = matte.detach()
        return loss, parts

    def shape_loss(self, predicted: Tensor, tracked: Tensor) -> Tensor:
        """Mean squared distance in cm² of the vertices of two heads, by their codes (B, I)."""
        head = shared_head(self.config.head, str(predicted.device))
        moved = ((predicted - tracked) * head.identity_std) @ head.identity_basis
        return (100 * moved).square().mean() * 3


class DecoderWithLoss(Drawn):
    """The decoder, a w for each training person, and the loss."""

    config: FastAvatarDecoderConfig

    def __init__(
        self, config: FastAvatarDecoderConfig, loss: LossConfig, decoder: Decoder, rows: dict[str, int]
    ) -> None:
        super().__init__(config, loss, decoder)
        self.rows = rows
        self.people = nn.Parameter(torch.randn(max(config.people, 1), config.latent) * config.latent_std)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Renders every person from their w on their tracked head and compares.

        Returns:
            The mean loss over the batch, and its parts.
        """
        tracked = identities(batch)
        rows = [self.rows[name.split("/")[0]] for name in batch["ids"]]
        latent = self.people[rows]
        made = self.decoder(latent)
        loss, parts = self.picture_losses(made, tracked, batch)
        if self.config.shape_weight:
            shape = self.shape_loss(made.identity, tracked)
            loss = loss + self.config.shape_weight * shape
            parts["shape"] = shape.detach()
        if self.config.latent_decay:
            loss = loss + self.config.latent_decay * latent.square().mean()
        return loss, parts


class EncoderWithLoss(Drawn):
    """The encoder before the decoder, and the loss."""

    config: FastAvatarEncoderConfig
    table: Tensor

    def __init__(
        self,
        config: FastAvatarEncoderConfig,
        loss: LossConfig,
        decoder: Decoder,
        people: dict[str, Tensor],
    ) -> None:
        super().__init__(config, loss, decoder)
        self.encoder = Encoder(config)
        self.rows = {name: row for row, name in enumerate(people)}
        table = torch.stack(list(people.values())) if people else torch.zeros(0, config.latent)
        self.register_buffer("table", table, persistent=False)
        self._said: OrderedDict[str, Tensor | None] = OrderedDict()
        if people and not config.decoder_rate:
            decoder.requires_grad_(False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Regresses w from the pictures of the batch, and, where asked for, compares pictures of what it means.

        Returns:
            The mean loss over the batch, and its parts.
        """
        config = self.config
        images = batch["target_images"]
        people = len(images)
        seen, owner = self._looked_at(batch)
        latent = self.encoder(seen)  # (pictures, d)
        names = [name.split("/")[0] for name in batch["ids"]]
        # The sum over the parameters keeps a graph where every weight below is 0 for this batch.
        loss, parts = latent.sum() * 0, dict[str, Tensor]()
        if self.rows:
            wanted = self.table[[self.rows[name] for name in names]][owner]
            cosine = 1 - nn.functional.cosine_similarity(latent, wanted).mean()
            error = nn.functional.mse_loss(latent, wanted)
            loss = loss + config.cosine_weight * cosine + config.mse_weight * error
            parts |= {"cosine": cosine.detach(), "mse": error.detach()}
        if config.nce_weight:
            number = {name: place for place, name in enumerate(dict.fromkeys(names))}
            identity = torch.tensor([number[name] for name in names], device=images.device)[owner]
            nce = info_nce(latent, identity, config.temperature)
            loss = loss + config.nce_weight * nce
            parts["nce"] = nce.detach()
        if config.shape_weight:
            shape = self.shape_loss(self.decoder.head_of(latent), identities(batch)[owner])
            loss = loss + config.shape_weight * shape
            parts["shape"] = shape.detach()
        if config.picture_weight or not self.rows:
            # One picture says who it is, and the others of the same moment say what that must look like: the first that
            # the backbone has found a face in, which the plan draws anew each time.
            places = [(owner == person).nonzero()[:1, 0] for person in range(people)]
            found = [person for person, place_ in enumerate(places) if len(place_)]
            found = found[: config.picture_people or None]
            made = self.decoder(latent[torch.cat([places[person] for person in found])])
            some = {
                key: value[found] if isinstance(value, Tensor) and value.ndim else value
                for key, value in batch.items()
            }
            for key in ("target_images", "target_masks", "target_K", "target_world_to_camera"):
                # The last ones: the first is what the person was most likely decoded from.
                some[key] = some[key][:, -config.picture_views :]
            drawn, told = self.picture_losses(made, made.identity, some)
            loss = loss + (config.picture_weight or 1.0) * drawn
            parts |= told
        return loss, parts

    def _looked_at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the encoder takes of the pictures, person by person, and whose (places in the batch) each is.

        Left out are pictures from too far to the side and those in which the backbone finds no face.

        Raises:
            UserError: there are not two such pictures.
        """
        sources = ["target", "input"] if "input_images" in batch else ["target"]
        images, masks, cameras = (
            torch.cat([batch[f"{source}_{what}"] for source in sources], 1)
            for what in ("images", "masks", "world_to_camera")
        )
        people, pictures = images.shape[:2]
        centers = -(cameras[..., :3, :3].mT @ cameras[..., :3, 3:])[..., 0]
        ahead = centers[..., 2] / centers.norm(dim=-1)
        kept = (ahead >= math.cos(math.radians(self.config.degrees)) - 1e-6).flatten().nonzero()[:, 0]
        images, masks = images.flatten(0, 1)[kept], masks.flatten(0, 1)[kept]
        # Input pictures may have kept what is behind the head, which nobody sees when an avatar is made.
        images = images * (masks > 0)
        owner = torch.arange(people, device=images.device).repeat_interleave(pictures)[kept]
        if self.config.backbone not in FROZEN:
            if len(kept) < 2:
                raise UserError(
                    f"Not two pictures of this batch were taken within {self.config.degrees:g} degrees of straight "
                    "ahead; take more --data.views, or more --model.degrees."
                )
            return crops(images, face_boxes(masks), self.config.backbone_size), owner
        look = recogniser(self.config.backbone)
        said = []
        for place_, image in zip(kept.tolist(), images, strict=True):
            # An example's name without its place in the plan says which pictures it holds.
            name = f"{batch['ids'][place_ // pictures].split('@')[0]}#{place_ % pictures}"
            if name not in self._said:
                if len(self._said) >= REMEMBERED:
                    self._said.popitem(last=False)
                self._said[name] = look(image)
            said.append(self._said[name])
        found = [place_ for place_, value in enumerate(said) if value is not None]
        if len(found) < 2:
            raise UserError(
                f"dlib finds no face in the pictures of this batch, which the backbone {self.config.backbone!r} needs; "
                "take larger pictures, more --data.views or a backbone of timm."
            )
        kept_said = torch.stack([value for value in said if value is not None])
        return kept_said.to(images), owner[found]


def identities(batch: Batch) -> Tensor:
    """The tracked identity codes (B, I) of a batch."""
    if "identity" not in batch:
        raise UserError(
            "FastAvatar is trained on captures that a parametric head tracked, and the shards have no identity codes; "
            "pack captures with tracking."
        )
    return batch["identity"]


def info_nce(latent: Tensor, identity: Tensor, temperature: float) -> Tensor:
    """Supervised InfoNCE: each picture's mean log share of its person's other pictures among all others.

    Args:
        latent: (P, d).
        identity: (P,) number of the person.
        temperature: of the softmax over cosines.
    """
    unit = nn.functional.normalize(latent, dim=-1)
    itself = torch.eye(len(latent), dtype=torch.bool, device=latent.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, float("-inf"))
    same = (identity[:, None] == identity) & ~itself
    share = logits.log_softmax(1).masked_fill(~same, 0.0)
    return -(share.sum(1) / same.sum(1).clamp_min(1)).mean()


class FastAvatarTask:
    """What the two tasks have in common."""

    reads_inputs = False
    prior_values = 0

    config: Any

    def __init__(self, config: TrainConfig) -> None:
        self.loss = config.loss
        self.size = self.config.size
        self.most_gaussians = seated(self.config)
        self.rows: dict[str, int] = {}

    def check(self, manifest: Manifest) -> None:
        """Pictures and codes must be of the network's size, and tracked with its head. Remembers the people.

        Raises:
            UserError: one of them is not.
        """
        config = self.config
        check_size(manifest, config.size)
        check_codes(manifest, config.expression_dim)
        check_head(manifest, config.head)
        self.rows = {name: row for row, name in enumerate(manifest.subjects("train"))}

    def check_weights(self) -> None:
        """LPIPS sets in late, and its weights must be there from the start.

        Raises:
            UserError: they are not.
        """
        PictureLoss(self.loss).check_weights()

    def untrained(self) -> Decoder:
        """A decoder on a grey head: what is learned where no template is given."""
        config: FastAvatarConfig = self.config
        count = seated(config)
        if torch.get_default_device().type == "meta":  # only shapes are asked for
            return Decoder(config.network(), count)
        head = shared_head(config.head)
        nobody, calm = torch.zeros(1, head.n_identity), torch.zeros(1, head.n_expression)
        centers, _ = seats_of(head, config.uv_resolution).posed(head.vertices(nobody, calm))
        grey = FastAvatar(
            first_look(centers[0], config),
            nobody[0],
            head=config.head,
            uv_resolution=config.uv_resolution,
            expression_kind=head.expression_kind,
        )
        return Decoder(config.network(), count, grey)


class FastAvatarDecoderTask(FastAvatarTask):
    """The decoder's training (paper section 3.5): one w a person, learned with the network."""

    name = "fastavatar-decoder"
    makes_avatars = False
    next_step = (
        "Train the encoder on the same shards: headsplat launch fastavatar-encoder-cpu "
        '--args="--model.decoder EXPORT"'
    )

    def __init__(self, config: TrainConfig) -> None:
        self.config = of_kind(config.model, FastAvatarDecoderConfig)
        super().__init__(config)

    def build(self) -> nn.Module:
        """Decoder, table of w, loss.

        Raises:
            UserError: the template has another layout.
        """
        decoder = self.untrained()
        if self.config.template and torch.get_default_device().type != "meta":
            decoder.inherit(FastAvatar.load(template_folder(self.config.template)))
        if self.config.template:
            for value in inherited(decoder):
                value.requires_grad_(False)
        return DecoderWithLoss(self.config, self.loss, decoder, self.rows)

    def parameter_groups(self, module: nn.Module) -> list[tuple[float, list[Parameter]]]:
        """The decoder, and w at a rate of its own. A template that was given stays as it is."""
        decoder = module.get_submodule("decoder")
        return [
            (1.0, [value for value in decoder.parameters() if value.requires_grad]),
            (self.config.latent_rate, [module.get_parameter("people")]),
        ]

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """One person, on the meta device."""
        with torch.device("meta"):
            decoder = Decoder(self.config.network(), seated(self.config))
            return summed(decoder(torch.zeros(1, self.config.latent)))

    def method(self, state: dict[str, Tensor], expression_kind: str, device: str) -> FastAvatarMethod:
        """There is none yet: a decoder cannot look at pictures."""
        raise UserError("FastAvatar's decoder makes no avatars by itself; train the encoder.")

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the decoder with its template, and w by name."""
        assert isinstance(module, DecoderWithLoss)
        people = {name: module.people.detach()[row] for name, row in self.rows.items()}
        save_network(folder, self.name, module.decoder, None, provenance, people)

    def verify_export(self, module: nn.Module, folder: Path) -> None:
        """Loads strictly and compares weights and a forward pass.

        Raises:
            UserError: something differs.
        """
        assert isinstance(module, DecoderWithLoss)
        decoder, _, _, _ = read_network(folder)
        compare(module.decoder, decoder, torch.ones(1, self.config.latent), folder)


class FastAvatarEncoderTask(FastAvatarTask):
    """The encoder's training (paper sections 3.4 and 3.5), after the decoder's or, without one, together with it."""

    name = "fastavatar"
    makes_avatars = True
    next_step = ""

    def __init__(self, config: TrainConfig) -> None:
        self.config = of_kind(config.model, FastAvatarEncoderConfig)
        self.reads_inputs = self.config.nce_weight > 0
        super().__init__(config)

    def check(self, manifest: Manifest) -> None:
        """As both tasks; the decoder's people must be those of the shards.

        Raises:
            UserError: it is not so.
        """
        super().check(manifest)
        if self.config.decoder:
            known = read_network(self.config.decoder)[3]
            if unknown := sorted(set(self.rows) - set(known)):
                raise UserError(
                    f"The decoder in {self.config.decoder} has learned no w for {', '.join(unknown[:3])}; train the "
                    "encoder on the decoder's own shards."
                )

    def check_weights(self) -> None:
        """LPIPS, and a frozen backbone's.

        Raises:
            UserError: they are not there.
        """
        super().check_weights()
        if self.config.backbone in FROZEN:
            recogniser(self.config.backbone)

    def build(self) -> nn.Module:
        """Encoder, decoder, loss.

        Raises:
            UserError: no such decoder, or one of another shape.
        """
        if not self.config.decoder or torch.get_default_device().type == "meta":
            return EncoderWithLoss(self.config, self.loss, self.untrained(), {})
        decoder, _, told, people = read_network(self.config.decoder)
        if not self.config.same_decoder_as(decoder.config):
            theirs, ours = decoder.config.to_json(), self.config.to_json()
            names = [name for name, value in theirs.items() if value != ours[name]]
            raise UserError(
                f"The decoder in {self.config.decoder} has another {' and '.join(names)} than the recipe; set --model."
                f"{names[0].replace('_', '-')} {theirs[names[0]]}."
            )
        if not people:
            raise UserError(
                f"{told['method']} in {self.config.decoder} holds no learned w; name a decoder's export."
            )
        return EncoderWithLoss(self.config, self.loss, decoder, people)

    def parameter_groups(self, module: nn.Module) -> list[tuple[float, list[Parameter]]]:
        """The encoder, and the decoder where it learns too."""
        groups = [(1.0, list(module.get_submodule("encoder").parameters()))]
        learned = [value for value in module.get_submodule("decoder").parameters() if value.requires_grad]
        if learned:
            groups.append((self.config.decoder_rate or 1.0, learned))
        return groups

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """Two pictures of one person, and the decoder, on the meta device."""
        config = self.config
        with torch.device("meta"):
            encoder, decoder = Encoder(config), Decoder(config.network(), seated(config))
            side = config.backbone_size
            shape = (2, FROZEN[config.backbone]) if config.backbone in FROZEN else (2, 3, side, side)
            latent = encoder(torch.zeros(shape))
            return summed(decoder(latent[:1])) + latent.sum()

    def method(self, state: dict[str, Tensor], expression_kind: str, device: str) -> FastAvatarMethod:
        """The method with these weights."""
        module = EncoderWithLoss(
            self.config, self.loss, Decoder(self.config.network(), seated(self.config)), {}
        )
        module.load_state_dict(state)
        provenance = {"expression_kind": expression_kind}
        return FastAvatarMethod(
            module.decoder.to(device), module.encoder.to(device), expression_kind, provenance
        )

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes encoder and decoder."""
        assert isinstance(module, EncoderWithLoss)
        save_network(folder, self.name, module.decoder, module.encoder, provenance)

    def verify_export(self, module: nn.Module, folder: Path) -> None:
        """Loads strictly and compares weights and a forward pass.

        Raises:
            UserError: something differs.
        """
        assert isinstance(module, EncoderWithLoss)
        decoder, encoder, _, _ = read_network(folder)
        assert encoder is not None
        compare(module.decoder, decoder, torch.ones(1, self.config.latent), folder)
        side = self.config.backbone_size
        frozen = FROZEN.get(self.config.backbone)
        picture = torch.rand(2, frozen) if frozen else torch.rand(2, 3, side, side)
        compare(module.encoder, encoder, picture, folder)


def inherited(decoder: Decoder) -> list[Parameter]:
    """The base Gaussians, the mean head and the embeddings, which the authors freeze."""
    return [*decoder.template.parameters(), decoder.mean_identity, decoder.embedding]


def template_folder(folder: str) -> Path:
    """Where a template is.

    Raises:
        UserError: it is not there.
    """
    if not (Path(folder) / "avatar.json").is_file():
        raise UserError(
            f"--model.template {folder} holds no avatar.json; make a template with headsplat template, or leave the "
            "option out to learn one with the decoder."
        )
    return Path(folder)


def summed(made: Decoded) -> Tensor:
    """A scalar that every output of a decoder is in."""
    values = [*vars(made.local).values(), made.identity]
    return torch.stack([value.sum() for value in values]).sum()


@torch.no_grad()
def compare(ours: nn.Module, theirs: nn.Module, given: Tensor, folder: Path) -> None:
    """Refuses an export that is not what it was written from.

    Raises:
        UserError: a weight or the output differs.
    """
    mine, read = ours.state_dict(), theirs.state_dict()
    differing = [name for name in mine if not torch.equal(mine[name].float().cpu(), read[name].float())]
    if differing:
        raise UserError(f"{folder} reads back otherwise than it was written, in {', '.join(differing[:3])}.")
    results = []
    for module in (ours, theirs):
        was = module.training
        made = module.cpu().eval()(given)
        module.train(was)
        results.append(
            made if isinstance(made, Tensor) else torch.cat([made.local.colors.flatten(), made.identity[0]])
        )
    if not torch.equal(*results):
        raise UserError(f"{folder} reads back with equal weights and another forward pass; do not use it.")
