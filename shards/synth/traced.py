"""The path-traced quality: the same person, camera and light through Mitsuba 3.

Masks and depths stay those of the fast renderer, which draws the same triangles through the same camera.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.synth import raster
from shards.synth.light import Light, sphere
from shards.synth.render import BACKGROUND, encode_srgb
from shards.synth.subject import Posed

__all__ = ["TracedPerson"]

Array = NDArray[np.float64]

MAX_DEPTH = 5
# Principled BSDF (Burley 2012) by material: roughness and specular.
SURFACES = {
    raster.SKIN: (0.42, 0.4),
    raster.EYE: (0.06, 0.6),
    raster.WET: (0.20, 0.5),
    raster.TEETH: (0.18, 0.5),
}


class TracedPerson:
    """A posed person as a Mitsuba scene that can be looked at from many cameras.

    Args:
        posed: the person in the head frame.
        light: in the studio frame.
        head_to_studio: (4, 4).
    """

    def __init__(self, posed: Posed, light: Light, head_to_studio: Array) -> None:
        import mitsuba as mi

        mi.set_variant("scalar_rgb")  # the LLVM variants need a system LLVM; this one needs nothing
        self.mi = mi
        albedo = mi.Bitmap(np.ascontiguousarray(posed.texture[..., :3]))
        texture = {"type": "bitmap", "bitmap": albedo, "raw": True, "wrap_mode": "clamp"}
        scene: dict[str, Any] = {"type": "scene", "light": self._environment(light, head_to_studio)}
        for kind in np.unique(posed.material):
            scene[f"part{kind}"] = self._part(posed, posed.material == kind, int(kind), texture)
        scene["integrator"] = {"type": "path", "max_depth": MAX_DEPTH, "hide_emitters": True}
        self.scene = mi.load_dict(scene)

    def _environment(self, light: Light, head_to_studio: Array) -> dict[str, Any]:
        """The light's directions, blurred over their spacing, as a latitude-longitude map."""
        v, u = (np.mgrid[:48, :96] + 0.5) / np.array([48, 96])[:, None, None]
        phi, theta = 2 * np.pi * u, np.pi * v
        direction = np.stack(
            [np.sin(phi) * np.sin(theta), np.cos(theta), -np.cos(phi) * np.sin(theta)], axis=-1
        )
        weight = np.exp((direction @ sphere().T - 1) / 0.03)
        radiance = (weight / weight.sum(axis=-1, keepdims=True)) @ light.radiance
        turn = np.eye(4)
        turn[:3, :3] = head_to_studio[:3, :3].T
        bitmap = self.mi.Bitmap(radiance.astype(np.float32))
        return {"type": "envmap", "bitmap": bitmap, "to_world": self.mi.ScalarTransform4f(turn.tolist())}

    def _part(self, posed: Posed, chosen: NDArray[np.bool_], kind: int, texture: dict[str, Any]) -> Any:
        """The faces of one material, corners apart because their UVs are."""
        mi = self.mi
        corners = posed.faces[chosen].reshape(-1)
        hair = kind == raster.HAIR
        if hair:
            surface: dict[str, Any] = {
                "type": "principled", "roughness": 0.35, "specular": 0.3,
                "base_color": {"type": "mesh_attribute", "name": "vertex_color"},
            }  # fmt: skip
        elif kind == raster.CLOTH:
            surface = {"type": "diffuse", "reflectance": texture}
        else:
            roughness, specular = SURFACES[kind]
            surface = {
                "type": "principled",
                "roughness": roughness,
                "specular": specular,
                "base_color": texture,
            }
        properties = mi.Properties()
        properties["bsdf"] = mi.load_dict({"type": "twosided", "inner": surface})
        mesh = mi.Mesh(
            f"part{kind}", len(corners), len(corners) // 3, has_vertex_normals=not hair, has_vertex_texcoords=not hair,
            props=properties,
        )  # fmt: skip
        if hair:
            mesh.add_attribute("vertex_color", 3, posed.tint[corners].ravel())
        values = mi.traverse(mesh)
        values["vertex_positions"] = posed.points[corners].ravel()
        values["faces"] = np.arange(len(corners), dtype=np.uint32)
        if not hair:
            values["vertex_normals"] = posed.normals[corners].ravel()
            values["vertex_texcoords"] = posed.uv[chosen].ravel()
        values.update()
        return mesh

    def render(
        self, K: Array, world_to_camera: Array, size: int, *, samples: int, seed: int = 0
    ) -> NDArray[np.uint8]:
        """A picture (size, size, 3) in sRGB over the studio's dark background, `samples` paths a pixel.

        The noise depends on the seed (below 2³²) alone, not on the number of threads.
        """
        mi = self.mi
        # Mitsuba's cameras have x to the left and y up, and shift the film instead of the principal point.
        to_world = np.linalg.inv(world_to_camera) @ np.diag([-1.0, -1.0, 1.0, 1.0])
        sensor = mi.load_dict(
            {
                "type": "perspective", "fov_axis": "x", "fov": float(np.degrees(2 * np.arctan(size / (2 * K[0, 0])))),
                "principal_point_offset_x": float(0.5 - K[0, 2] / size),
                "principal_point_offset_y": float(0.5 - K[1, 2] / size),
                "near_clip": 0.1, "far_clip": 10.0, "to_world": mi.ScalarTransform4f(to_world.tolist()),
                "sampler": {"type": "independent", "sample_count": samples},
                "film": {
                    "type": "hdrfilm", "width": size, "height": size, "pixel_format": "rgba",
                    "component_format": "float32", "rfilter": {"type": "box"},
                },
            }
        )  # fmt: skip
        picture = np.array(mi.render(self.scene, sensor=sensor, spp=samples, seed=seed))
        return encode_srgb(picture[..., :3] + (1 - picture[..., 3:]) * BACKGROUND)
