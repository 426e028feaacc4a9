"""ViTGAN a second time, written from the formulas alone: slow, plain, in float64, and without a line of the notebook.

`weights` is everywhere a dict of tensors under the names of the notebook's `state_dict`, the buffers of the spectral
normalisation beside their weight: `head.weight`, `head.u`, `head.v`, `head.sigma_init`. Images and tokens are handled
one image at a time, patches of the decoder one patch at a time.

Sources: ViTGAN is Lee et al. 2022 (arXiv:2107.04589), cited by the headings of its Section "Method". Where it is silent
a docstring says *the notebook's decision*.
"""

import math

import torch
from torch import Tensor

BUFFERS = ("w_mean", "u", "v", "sigma_init")  # what no optimizer moves


# Parts of both networks


def linear(weights: dict, name: str, x: Tensor, multiplier: float = 1.0) -> Tensor:
    """m / √n · W x + m b: equalized learning rate (Karras et al. 2018, Section 4.1; m: Karras et al. 2019, App. C).

    (..., n) -> (..., out). ViTGAN is silent: the notebook's decision for every linear layer.
    """
    w = weights[f"{name}.weight"]
    y = multiplier / math.sqrt(w.shape[1]) * (x @ w.T)
    if f"{name}.bias" in weights:
        y = y + multiplier * weights[f"{name}.bias"]
    return y


def standardised(h: Tensor) -> Tensor:
    """(h - μ) / σ over the features of a token (Ba et al. 2016, Section 3), 10⁻⁵ added to σ². (N, D) -> same."""
    mean = h.sum(-1, keepdim=True) / h.shape[-1]
    variance = ((h - mean) ** 2).sum(-1, keepdim=True) / h.shape[-1]
    return (h - mean) / torch.sqrt(variance + 1e-5)


def softmax(logits: Tensor) -> Tensor:
    """Positive rows of sum 1. (N, N) -> (N, N)."""
    e = torch.exp(logits)
    return e / e.sum(-1, keepdim=True)


def mlp(weights: dict, name: str, h: Tensor) -> Tensor:
    """Two layers, a GELU between (Dosovitskiy et al. 2021, Section 3.1). (N, D) -> (N, D).

    GELU is x Φ(x), Φ the normal distribution function itself (Hendrycks & Gimpel 2016, Section 2), not its tanh.
    """
    x = linear(weights, f"{name}.up", h)
    return linear(weights, f"{name}.down", x * (1 + torch.erf(x / math.sqrt(2))) / 2)


def blocks(weights: dict) -> list[str]:
    """The names of the Transformer blocks, first to last."""
    return [f"blocks.{k}" for k in sorted({int(name.split(".")[1]) for name in weights if name.startswith("blocks.")})]


def centres(side: int) -> Tensor:
    """Centres (side², 2) of the cells of a grid over [-1, 1]², row by row, each (x, y). The notebook's decision."""
    return torch.tensor(
        [[(2 * column + 1) / side - 1, (2 * row + 1) / side - 1] for row in range(side) for column in range(side)],
        dtype=torch.float64,
    )


# Generator


def mapping(weights: dict, z: Tensor) -> Tensor:
    """Latents (B, Z) -> styles (B, D): z to unit mean square (Karras et al. 2018, Section 4.2), then leaky layers.

    Karras et al. 2019, Section 2, and its code: slope 0.2, gain √2, multiplier 0.01. ViTGAN says "mapping network".
    """
    x = z / torch.sqrt((z**2).sum(1, keepdim=True) / z.shape[1] + 1e-8)
    for k in range(sum(name.startswith("mapping.layers.") and name.endswith(".weight") for name in weights)):
        x = linear(weights, f"mapping.layers.{k}", x, multiplier=0.01)
        x = math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)
    return x


def joined(weights: dict, z: Tensor, labels: list[int]) -> Tensor:
    """Latents (B, Z) and labels -> (B, 2Z): z, then the label's vector at unit mean square (Karras et al. 2020a's code)."""
    vectors = torch.stack([weights["mapping.embedding.weight"][:, label] for label in labels])
    return torch.cat([z, vectors / torch.sqrt((vectors**2).sum(1, keepdim=True) / vectors.shape[1] + 1e-8)], 1)


def mean_style(w_mean: Tensor, w: Tensor) -> Tensor:
    """w̄ ← 0.995 w̄ + 0.005 · mean of the batch w (B, D) (Karras et al. 2019, App. B; the rate is their code's)."""
    return 0.995 * w_mean + 0.005 * w.detach().sum(0) / len(w)


def truncated(w_mean: Tensor, w: Tensor, psi: float) -> Tensor:
    """w' = w̄ + ψ (w - w̄) (Karras et al. 2019, App. B). (B, D) -> (B, D)."""
    return w_mean + psi * (w - w_mean)


def self_modulated_norm(weights: dict, name: str, h: Tensor, w: Tensor) -> Tensor:
    """SLN(h, w) = (1 + γ(w)) ⊙ (h - μ) / σ + β(w) (ViTGAN, "Self-modulated LayerNorm", its one equation).

    h (N, D), w (D,) -> (N, D). The paper scales by γ; 1 + γ is the notebook's decision.
    """
    d = h.shape[1]
    both = linear(weights, f"{name}.gamma_beta", w)
    return (1 + both[:d]) * standardised(h) + both[d:]


def dot_product_attention(weights: dict, name: str, h: Tensor, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √d) V for each head, then the output layer (Vaswani et al. 2017, Eq. 1 and Section 3.2.2).

    (N, D) -> (N, D); of the rows of `qkv` the first third makes Q, then K, V; head by head within each.
    """
    dim = h.shape[1]
    qkv, d = linear(weights, f"{name}.qkv", h), dim // heads
    values = []
    for head in range(heads):
        q, k, v = (qkv[:, part * dim + head * d : part * dim + (head + 1) * d] for part in range(3))
        values.append(softmax(q @ k.T / math.sqrt(d)) @ v)
    return linear(weights, f"{name}.out", torch.cat(values, 1))


def modulated(weights: dict, name: str, x: Tensor, y: Tensor, demodulate: bool) -> Tensor:
    """Pixels x (M, in) by the weights of the patch whose vector is y (D,) -> (M, out).

    W'ᵢⱼ = sⱼ Wᵢⱼ and W''ᵢⱼ = W'ᵢⱼ / √(Σⱼ W'ᵢⱼ² + 10⁻⁸) (Karras et al. 2020, Section 2.2, Eq. 1 and 3).
    """
    w = weights[f"{name}.linear.weight"] / math.sqrt(x.shape[1])
    w = linear(weights, f"{name}.scale", y) * w
    if demodulate:
        w = w / torch.sqrt((w**2).sum(1, keepdim=True) + 1e-8)
    return x @ w.T + weights[f"{name}.linear.bias"]


def paint_patch(weights: dict, y: Tensor, patch_size: int, omega_0: float, demodulate: bool) -> Tensor:
    """The colours (3, P, P) of the patch with vector y (D,): a SIREN on Fourier features of the pixels' positions.

    x₀ = sin(A v + b), xₖ = sin(ω₀ Modₖ(xₖ₋₁)), colour = Mod_RGB(x) (ViTGAN, "Implicit Neural Representation for Patch
    Generation"; Sitzmann et al. 2020, Section 3). No sine after RGB and no demodulation in it: the notebook's decision.
    """
    x = torch.sin(linear(weights, "siren.fourier.wave", centres(patch_size)))
    for k in range(sum(name.startswith("siren.layers.") and name.endswith(".linear.weight") for name in weights)):
        x = torch.sin(omega_0 * modulated(weights, f"siren.layers.{k}", x, y, demodulate))
    return modulated(weights, "siren.rgb", x, y, demodulate=False).T.reshape(3, patch_size, patch_size)


def generator(
    weights: dict, w: Tensor, image_size: int, patch_size: int, heads: int, omega_0: float, demodulate: bool
) -> Tensor:
    """Styles (B, D) -> images (B, 3, H, W) (ViTGAN, "Generator Design", the equations from h₀ to the image).

    h₀ = sin(E_pos), h' = MSA(SLN(h, w)) + h, h'' = MLP(SLN(h', w)) + h', y = SLN(h, w), each patch from its own y.
    """
    grid, images = image_size // patch_size, []
    for style in w:
        h = torch.sin(linear(weights, "position", centres(grid)))
        for block in blocks(weights):
            normed = self_modulated_norm(weights, f"{block}.norm1", h, style)
            h = dot_product_attention(weights, f"{block}.attention", normed, heads) + h
            h = mlp(weights, f"{block}.mlp", self_modulated_norm(weights, f"{block}.norm2", h, style)) + h
        y = self_modulated_norm(weights, "norm", h, style)
        patches = [paint_patch(weights, y[n], patch_size, omega_0, demodulate) for n in range(grid**2)]
        images.append(torch.cat([torch.cat(patches[r * grid : (r + 1) * grid], 2) for r in range(grid)], 1))
    return torch.stack(images)


# Discriminator


def power_iteration(weights: dict) -> dict:
    """`weights` with u and v of every layer a step on: v = Wᵀu / ‖Wᵀu‖, u = Wv / ‖Wv‖ (Miyato et al. 2018, Alg. 1).

    One step for each step of the discriminator, none in the generator's: the notebook's decision.
    """
    moved = dict(weights)
    for layer in (name.removesuffix(".u") for name in weights if name.endswith(".u")):
        w = weights[f"{layer}.weight"].detach()
        v = w.T @ weights[f"{layer}.u"]
        moved[f"{layer}.v"] = v / torch.sqrt((v**2).sum())
        u = w @ moved[f"{layer}.v"]
        moved[f"{layer}.u"] = u / torch.sqrt((u**2).sum())
    return moved


def spectrally_normalised(weights: dict) -> dict:
    """`weights` with W̄ = σ(W_init) W / σ(W) for every W (ViTGAN, "Improved Spectral Normalization", its one equation).

    σ(W) = uᵀ W v with u, v as constants, through which the gradient passes (Miyato et al. 2018, Section 2.1).
    """
    normalised = dict(weights)
    for layer in (name.removesuffix(".u") for name in weights if name.endswith(".u")):
        w = weights[f"{layer}.weight"]
        sigma = (weights[f"{layer}.u"][:, None] * w * weights[f"{layer}.v"][None, :]).sum()
        normalised[f"{layer}.weight"] = weights[f"{layer}.sigma_init"] * w / sigma
    return normalised


def layer_norm(weights: dict, name: str, h: Tensor) -> Tensor:
    """Scale and shift of their own after standardising (Ba et al. 2016, Section 3). (N, D) -> (N, D)."""
    return weights[f"{name}.weight"] * standardised(h) + weights[f"{name}.bias"]


def l2_attention(weights: dict, name: str, h: Tensor, heads: int) -> Tensor:
    """softmax(-‖qᵢ - qⱼ‖² / d) V for each head, then the output layer. (N, D) -> (N, D).

    ViTGAN, "Enforcing Lipschitzness of Transformer Discriminator", the equation of attention, with query and key tied.
    The minus is that of Kim et al. 2021 (Section 3.2); d for √d, and no bias in q, are the notebook's decisions.
    """
    q, v = linear(weights, f"{name}.qk", h), linear(weights, f"{name}.value", h)
    d, values = h.shape[1] // heads, []
    for head in range(heads):
        of = slice(head * d, (head + 1) * d)
        distance = ((q[:, None, of] - q[None, :, of]) ** 2).sum(2)
        values.append(softmax(-distance / d) @ v[:, of])
    return linear(weights, f"{name}.out", torch.cat(values, 1))


def discriminator(weights: dict, images: Tensor, patch_size: int, heads: int) -> Tensor:
    """Images (B, 3, H, W) -> logits (B,): a Vision Transformer (Dosovitskiy et al. 2021, Eq. 1 to 4), its head linear.

    Patches 2P wide, P apart, P/2 of zeros around the image (ViTGAN, "Overlapping Image Patches"). Every layer is
    normalised first. A linear head without activation: the notebook's decision.
    """
    weights, p, logits = spectrally_normalised(weights), patch_size, []
    for image in images:
        side = image.shape[1]
        wide = torch.zeros(3, side + p, side + p, dtype=image.dtype)
        wide[:, p // 2 : p // 2 + side, p // 2 : p // 2 + side] = image
        corners = [(row, column) for row in range(0, side, p) for column in range(0, side, p)]
        patches = torch.stack(
            [wide[:, row : row + 2 * p, column : column + 2 * p].reshape(-1) for row, column in corners]
        )
        h = torch.cat([weights["class_token"].reshape(1, -1), linear(weights, "patches.linear", patches)])
        h = h + weights["position"]
        for block in blocks(weights):
            h = l2_attention(weights, f"{block}.attention", layer_norm(weights, f"{block}.norm1", h), heads) + h
            h = mlp(weights, f"{block}.mlp", layer_norm(weights, f"{block}.norm2", h)) + h
        logits.append(linear(weights, "head", layer_norm(weights, "norm", h[:1]))[0, 0])
    return torch.stack(logits)


# Augmentation, with given random numbers


def color(images: Tensor, uniform: Tensor) -> Tensor:
    """Brightness + [-0.5, 0.5], then saturation × [0, 2], contrast × [0.5, 1.5] (Zhao et al. 2020, Section 3.2).

    Images (B, 3, H, W) -> same; `uniform` (3, B) in [0, 1): where in its range each of the three lies, for each image.
    """
    changed = []
    for x, (brightness, saturation, contrast) in zip(images, uniform.T, strict=True):
        x = x + (-0.5 + brightness)
        grey = (x[0] + x[1] + x[2]) / 3
        x = torch.stack([grey + (0 + 2 * saturation) * (channel - grey) for channel in x])
        mean = x.sum() / x.numel()
        changed.append(mean + (0.5 + contrast) * (x - mean))
    return torch.stack(changed)


def translation(images: Tensor, shift: Tensor) -> Tensor:
    """Pixel (i, j) becomes pixel (i + row, j + column), zero beyond the border (Zhao et al. 2020, Section 3.2).

    Images (B, 3, H, W) -> same; `shift` (2, B), (row, column) of each image, at most H / 8 either way.
    """
    side = images.shape[2]
    moved = torch.zeros_like(images)
    for b, (row, column) in enumerate(shift.T.tolist()):
        assert abs(row) <= side / 8 and abs(column) <= side / 8
        to_i, to_j = slice(max(0, -row), min(side, side - row)), slice(max(0, -column), min(side, side - column))
        from_i, from_j = slice(max(0, row), min(side, side + row)), slice(max(0, column), min(side, side + column))
        moved[b, :, to_i, to_j] = images[b, :, from_i, from_j]
    return moved


def cutout(images: Tensor, centre: Tensor) -> Tensor:
    """Zero in a square of half the side (Zhao et al. 2020, Section 3.2), cut off at the border.

    Images (B, 3, H, W) -> same; `centre` (2, B): row and column, 0 to H, of the corner between pixels at its middle.
    """
    half = images.shape[2] // 4
    mask = torch.ones_like(images)
    for b, (row, column) in enumerate(centre.T.tolist()):
        mask[b, :, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return images * mask


def augment(images: Tensor, numbers: dict) -> Tensor:
    """T(x): colour, then translation, then cutout; `numbers` holds the second argument of each.

    ViTGAN, "Implementation Details"; without the paper's scaling, and always all three: the notebook's decisions.
    """
    images = color(images, numbers["color"])
    return cutout(translation(images, numbers["translation"]), numbers["cutout"])


# Losses


def softplus(t: Tensor) -> Tensor:
    """log(1 + eᵗ)."""
    return torch.log(1 + torch.exp(t))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[-log sigmoid(D(x))] + E[-log(1 - sigmoid(D(G(z))))] (Goodfellow et al. 2014, Eq. 1). Logits (B,) -> scalar."""
    return (softplus(-real).sum() + softplus(fake).sum()) / len(real)


def generator_loss(fake: Tensor) -> Tensor:
    """E[-log sigmoid(D(G(z)))], non-saturating (Goodfellow et al. 2014, Section 3, last paragraph). (B,) -> scalar."""
    return softplus(-fake).sum() / len(fake)


def consistency(plain: Tensor, augmented: Tensor, weight: float) -> Tensor:
    """λ E[(D(x) - D(T(x)))²] (Zhao et al. 2021, "Balanced Consistency Regularization"). Logits (B,) -> scalar."""
    return weight * sum((a - b) ** 2 for a, b in zip(plain, augmented, strict=True)) / len(plain)


# Optimizers and average


def adam(weight: Tensor, gradient: Tensor, state: dict, rate: float, betas: tuple[float, float]) -> Tensor:
    """The moved weight (Kingma & Ba 2015, Algorithm 1); `state` starts empty and keeps t and the two moments."""
    t, m, v = state.get("adam", (0, torch.zeros_like(weight), torch.zeros_like(weight)))
    t = t + 1
    m = betas[0] * m + (1 - betas[0]) * gradient
    v = betas[1] * v + (1 - betas[1]) * gradient**2
    state["adam"] = (t, m, v)
    return weight - rate * (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + 1e-8)


def muon(weight: Tensor, gradient: Tensor, state: dict, rate: float) -> Tensor:
    """The moved matrix (Jordan et al. 2024): down five Newton-Schulz rounds X ← aX + (bA + cA²)X, A = XXᵀ.

    Momentum ½ with Nesterov's look ahead; a step of `rate`, root mean square: the notebook's decisions.
    """
    before = state.get("muon", torch.zeros_like(weight))
    state["muon"] = (before + gradient) / 2
    x = 3 / 4 * gradient + 1 / 4 * before
    x = x / torch.sqrt((x**2).sum())
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return weight - rate * math.sqrt(max(weight.shape)) * x


def moved(weights: dict, gradients: dict, states: dict, optimizer: str, rate: float, betas: tuple) -> dict:
    """`weights` after a step. Muon takes matrices with both sides over 10, Adam the rest: the notebook's decision."""
    new = dict(weights)
    for name, gradient in gradients.items():
        weight, state = weights[name].detach(), states.setdefault(name, {})
        if optimizer == "muon" and weight.ndim == 2 and min(weight.shape) > 10:
            new[name] = muon(weight, gradient, state, rate)
        else:
            new[name] = adam(weight, gradient, state, rate, betas)
    return new


def averaged(average: dict, weights: dict, half_life: float, batch: int, images: int) -> dict:
    """θ̄ ← β θ̄ + (1 - β) θ, β = 2^(-B / T), T = min(half-life, 5 % of the images so far), buffers too.

    Karras et al. 2020a (StyleGAN2-ADA), its code; ViTGAN names neither T nor the warm-up: the notebook's decision.
    """
    beta = 2 ** (-batch / min(half_life, 0.05 * images))
    return {name: beta * average[name] + (1 - beta) * weights[name].detach() for name in average}


# One training step


def with_gradients(weights: dict) -> dict:
    """Fresh leaves for all that an optimizer moves; buffers stay as they are."""
    return {name: value.detach().requires_grad_(name.split(".")[-1] not in BUFFERS) for name, value in weights.items()}


def gradients_of(loss: Tensor, weights: dict) -> dict:
    """d loss / d weight for every leaf of `with_gradients`."""
    leaves = {name: value for name, value in weights.items() if value.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def real_batch(images: Tensor, mirror: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> [-1, 1], mirrored left to right where `mirror` (B,). The notebook's decision."""
    x = 2 * images.to(torch.float64) / 255 - 1
    backwards = list(reversed(range(x.shape[3])))
    return torch.stack([x[b][:, :, backwards] if mirror[b] else x[b] for b in range(len(x))])


def training_step(run: dict, draws: dict, settings: dict) -> dict:
    """One step of discriminator, generator, average (ViTGAN, "Implementation Details"; order: the notebook's decision).

    `run` holds generator, discriminator and average (weights), state_g and state_d (of the optimizers, empty at first)
    and images (seen before this step); it is changed. `draws`: real (B, 3, H, W) in [-1, 1], z_d and z_g (B, Z),
    augment_d (numbers for B real and then B generated images) and augment_g, or None where the adversarial losses see the
    images as they are. Returns losses and gradients.
    """
    paint, judge = settings["generator"], settings["discriminator"]
    descent = {key: settings[key] for key in ("optimizer", "rate", "betas")}
    real, b = draws["real"], len(draws["real"])
    g, d = run["generator"], power_iteration(run["discriminator"])

    w = mapping(g, draws["z_d"])  # the discriminator's half: the fakes are constants
    g = g | {"mapping.w_mean": mean_style(g["mapping.w_mean"], w)}
    fake = generator(g, w, **paint).detach()
    both = augment(torch.cat([real, fake]), draws["augment_d"])
    d = with_gradients(d)
    plain_real, plain_fake, turned_real, turned_fake = (
        discriminator(d, x, **judge) for x in (real, fake, both[:b], both[b:])
    )
    as_they_are = draws["augment_g"] is None
    loss_d = discriminator_loss(*(plain_real, plain_fake) if as_they_are else (turned_real, turned_fake))
    bcr = consistency(plain_real, turned_real, settings["bcr_real"])
    bcr = bcr + consistency(plain_fake, turned_fake, settings["bcr_fake"])
    gradients_d = gradients_of(loss_d + bcr, d)
    d = moved(d, gradients_d, run["state_d"], **descent)

    g = with_gradients(g)  # the generator's half: the discriminator is a constant
    w = mapping(g, draws["z_g"])
    d = {name: value.detach() for name, value in d.items()}
    fake = generator(g, w, **paint)
    loss_g = generator_loss(discriminator(d, fake if as_they_are else augment(fake, draws["augment_g"]), **judge))
    gradients_g = gradients_of(loss_g, g)
    g = moved(g, gradients_g, run["state_g"], **descent)
    g["mapping.w_mean"] = mean_style(g["mapping.w_mean"], w)
    g = {name: value.detach() for name, value in g.items()}

    run["images"] += b
    average = averaged(run["average"], g, settings["half_life"], b, run["images"])
    run.update(generator=g, discriminator=d, average=average)
    losses = [value.detach() for value in (loss_d, bcr, loss_g)]
    return {"losses": losses, "discriminator": gradients_d, "generator": gradients_g}
