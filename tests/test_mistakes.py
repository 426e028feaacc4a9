"""Put every published mistake back, one at a time, and see that the check beside the concept notices.

Each row: what is wrong, the check that must fail, and the edits of `vitgan_nb.py` that make it wrong.
"""

import pytest
from conftest import SCRIPT, module_from

SOURCE = SCRIPT.read_text()
BLOCK = """        h = h + self.attention(self.norm1(h, w))  # (B, N, D)
        return h + self.mlp(self.norm2(h, w))  # (B, N, D)
"""
MODULATED = "return self.linear(x * s)  # (B, N, M, out)"
L2_PASS = "attend(q, q, v, 2 * scale, bias)"

MISTAKES = [
    (
        "the MLP's output is thrown away",
        "test_generator_block_is_its_two_equations",
        [(BLOCK, BLOCK.replace("return h + self.mlp(self.norm2(h, w))", "self.mlp(self.norm2(h, w))\n        return h"))],
    ),
    (
        "one norm shared by both halves of a block",
        "test_generator_block_is_its_two_equations",
        [("self.norm2, self.mlp = SelfModulatedLayerNorm(dim, w_dim), F", "self.norm2, self.mlp = self.norm1, F")],
    ),
    (
        "the residual is taken after the norm overwrote it",
        "test_generator_block_is_its_two_equations",
        [(BLOCK, "        h = self.norm1(h, w)\n        h = h + self.attention(h)\n"
                 "        h = self.norm2(h, w)\n        return h + self.mlp(h)\n")],
    ),
    (
        "softmax first, scaling after",
        "test_attention_is_the_libraries_attention",
        [("attend(q, k, v, 1 / math.sqrt(q.shape[-1]))", "(q @ k.mT).softmax(-1) / math.sqrt(q.shape[-1]) @ v")],
    ),
    (
        "scaled by the full width instead of the head's",
        "test_attention_is_the_libraries_attention",
        [("attend(q, k, v, 1 / math.sqrt(q.shape[-1]))",
          "attend(q, k, v, 1 / math.sqrt(h.shape[-1]))")],
    ),
    (
        "softmax of plus the distance",
        "test_l2_attention_is_its_formula",
        [("bias = -scale *", "bias = scale *"), (L2_PASS, L2_PASS.replace("2 * scale", "-2 * scale"))],
    ),
    (
        "query and key not tied",
        "test_l2_attention_is_its_formula",
        [("self.qk = EqualizedLinear(dim, dim, bias=False)",
          "self.k = EqualizedLinear(dim, dim, bias=False)\n        self.qk = EqualizedLinear(dim, dim, bias=False)"),
         (L2_PASS, L2_PASS.replace("q, q, v", "q, split_heads(self.k(h), self.heads), v"))],
    ),
    (
        "a mean in one term and a sum in the other",
        "test_l2_attention_is_its_formula",
        [("bias = -scale * q.square().sum(-1)", "bias = -scale * q.square().mean(-1)")],
    ),
    (
        "pixels and channels mixed on the way in",
        "test_modulated_linear_is_one_matrix_per_patch",
        [(MODULATED, "return self.linear((x * s).transpose(2, 3).reshape((x * s).shape))")],
    ),
    (
        "pixels and channels mixed on the way out",
        "test_modulated_linear_is_one_matrix_per_patch",
        [(MODULATED, "y = self.linear(x * s)\n            return y.transpose(2, 3).reshape(y.shape)")],
    ),
    (
        "the first sigma from one power step off a random vector",
        "test_improved_spectral_norm_starts_exact",
        [("        self.power_step(weight.detach())  #",
          "        self.u.copy_(F.normalize(torch.randn_like(self.u), dim=0))\n"
          "        self.power_step(weight.detach())\n"
          "        self.sigma_init.copy_(self.u @ weight.detach() @ self.v)  #")],
    ),
    (
        "the vectors kept outside state_dict",
        "test_improved_spectral_norm_holds_while_the_optimizer_works",
        [('"u", u[:, 0].clone())', '"u", u[:, 0].clone(), persistent=False)'),
         ('"v", vh[0].clone())', '"v", vh[0].clone(), persistent=False)'),
         ('"sigma_init", sigma[0].clone())', '"sigma_init", sigma[0].clone(), persistent=False)')],
    ),
    (
        "power steps thrown away, each from the first vectors",
        "test_improved_spectral_norm_holds_while_the_optimizer_works",
        [("                self.power_step(weight)\n            # u and v are",
          "                v = F.normalize(weight.T @ self.u, dim=0)\n                u = F.normalize(weight @ v, dim=0)\n"
          "                return self.sigma_init / (u @ (weight @ v)) * weight\n            # u and v are")],
    ),
    (
        "weights wrapped again as new parameters",
        "test_improved_spectral_norm_holds_while_the_optimizer_works",
        [("            layer.normalise = Imp",
          "            layer.weight = nn.Parameter(layer.weight.detach().clone())\n            layer.normalise = Imp")],
    ),
    (
        "a GELU after the last layer",
        "test_discriminator",
        [("        logits = self.head(h)[:, 0]", "        logits = F.gelu(self.head(h))[:, 0]")],
    ),
    (
        "(B,) against (B, 1) broadcasts",
        "test_balanced_consistency",
        [("    if logits.shape != augmented_logits.shape:", "    if False:")],
    ),
    (
        "the fake batch not detached",
        "test_each_half_of_a_step_trains_its_own_network",
        [("fake = g(z, **fake_c).detach()", "fake = g(z, **fake_c)")],
    ),
    (
        "the fake batch of the fast step not detached",
        "test_fast_step_is_the_plain_step",
        [("        with torch.no_grad(), self.autocast():\n            z, fake_c =", "        with self.autocast():\n            z, fake_c =")],
    ),
    (
        "the copies of real and painted images exchanged in the fast step",
        "test_fast_step_is_the_plain_step",
        [("d_real, d_fake, d_real_t, d_fake_t = logits", "d_real, d_fake, d_fake_t, d_real_t = logits")],
    ),
    (
        "the weights of bCR exchanged in the fast step",
        "test_fast_step_is_the_plain_step",
        [("        consistency = balanced_consistency(d_real, d_real_t, config.bcr_real)",
          "        consistency = balanced_consistency(d_real, d_real_t, config.bcr_fake)"),
         ("return loss, consistency + balanced_consistency(d_fake, d_fake_t, config.bcr_fake)",
          "return loss, consistency + balanced_consistency(d_fake, d_fake_t, config.bcr_real)")],
    ),
    (
        "an average over an exhausted iterator",
        "test_moving_average",
        [("    move(old, new, None)", "    new = iter(new)\n    list(new)\n    move(old, list(new) or old, None)")],
    ),
    (
        "real images in [0, 1]",
        "test_real_images_fill_minus_one_to_one",
        [("return images.float() / 127.5 - 1", "return images.float() / 255")],
    ),
    (
        "one change of colour for the whole batch",
        "test_diff_augment",
        [("torch.rand(3, len(x), 1, 1, 1, device", "torch.rand(3, 1, 1, 1, 1, device")],
    ),
    (
        "the bias learns at full pace",
        "test_equalized_linear_keeps_size_and_pace",
        [("self.bias_gain = lr_multiplier", "self.bias_gain = 1.0")],
    ),
    (
        "optimizer state not saved",
        "test_resumed_run_equals_unbroken_run",
        [("    for part in run.parts:\n", "    for part in run.parts[:3]:\n")],
    ),
    (
        "Muon up the gradient",
        "test_muon_moves_a_matrix_about_equally_far_in_all_directions",
        [("alpha=-size)", "alpha=size)")],
    ),
    (
        "Muon's step not scaled to the size of the matrix",
        "test_muon_moves_a_matrix_about_equally_far_in_all_directions",
        [('size = self.param_groups[0]["lr"] * math.sqrt(max(shape))', 'size = self.param_groups[0]["lr"]')],
    ),
    (
        "Muon with one round in place of five",
        "test_muon_moves_a_matrix_about_equally_far_in_all_directions",
        [("for _ in range(5):\n        A = x @ x.mT", "for _ in range(1):\n        A = x @ x.mT")],
    ),
    (
        "the state of one of two optimizers not read back",
        "test_resumed_run_equals_unbroken_run",
        [("zip(self.each, state[\"each\"], strict=True)", "zip(self.each[:1], state[\"each\"])")],
    ),
    (
        "no seed",
        "test_seed_decides_everything",
        [("        torch.manual_seed(config.seed)\n        judge", "        torch.seed()\n        judge"),
         ("        torch.manual_seed(config.seed)  # from", "        torch.seed()  # from")],
    ),
    (
        "latents from the seed that the weights began with",
        "test_latents_are_not_what_the_weights_began_with",
        [("manual_seed(2**32 - 1 - seed)", "manual_seed(seed)")],
    ),
    (
        "real images always better than noise, by a metric that looks at one side only",
        "test_kid_is_its_formula_and_ranks",
        [(".split(lot) for images in (samples, real))", ".split(lot) for images in (real, real))")],
    ),
    (
        "exercise: no √2 in the mapping network",
        "test_mapping_network",
        [("w = math.sqrt(2) * F.leaky_relu(", "w = F.leaky_relu(")],
    ),
    (
        "exercise: Fourier features 64 times slower",
        "test_fourier_features_tell_pixels_apart",
        [("waves(out_features, math.pi / 8)", "waves(out_features, math.pi / 512)")],
    ),
    (
        "exercise: one style for the whole batch",
        "test_sln_is_layer_norm_modulated_by_the_style",
        [("self.gamma_beta(w)[:, None]", "self.gamma_beta(w.mean(0, keepdim=True))[:, None]")],
    ),
    (
        "exercise: the axes of rows exchanged",
        "test_patches_to_image_undoes_cutting",
        [("x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 3, 1, 2, 4)")],
    ),
    (
        "exercise: patches that do not touch",
        "test_overlapping_patches",
        [("kernel_size=2 * p, stride=p, padding=p // 2", "kernel_size=p, stride=p"),
         ("EqualizedLinear(3 * (2 * patch_size) ** 2, dim)", "EqualizedLinear(3 * patch_size**2, dim)")],
    ),
    (
        "exercise: plain spectral normalisation",
        "test_improved_spectral_norm_starts_exact",
        [("return self.sigma_init / sigma * weight", "return weight.shape[1] ** 0.5 / sigma * weight")],
    ),
    (
        "the label not joined to the latent",
        "test_the_label_matters_and_only_its_own_vector_learns",
        [("super().forward(torch.cat([z, e], 1), truncation)", "super().forward(torch.cat([z, z], 1), truncation)")],
    ),
    (
        "a projection that is not divided by √D",
        "test_projection_is_its_formula",
        [("* h).sum(1) / math.sqrt(h.shape[1])", "* h).sum(1)")],
    ),
    (
        "painted images judged with the labels of the real ones",
        "test_every_image_is_judged_with_its_own_label",
        [("d(fake_t, **fake_c)", "d(fake_t, **real_c)")],
    ),
    (
        "labels of the fast step in the wrong order",
        "test_every_image_is_judged_with_its_own_label",
        [("torch.cat([real_c[name], fake_c[name]] * 2)", "torch.cat([fake_c[name], real_c[name]] * 2)")],
    ),
    (
        "R1 without its half",
        "test_slope_penalty",
        [("return weight / 2 * slope", "return weight * slope")],
    ),
    (
        "an untrained generator that paints at half contrast",
        "test_generator",
        [("        nn.init.normal_(self.rgb.linear.weight, std=0.1)", "        nn.init.normal_(self.rgb.linear.weight, std=0.5)")],
    ),
    (
        "images that only ever become brighter",
        "test_diff_augment",
        [("x = x + (brightness - 0.5)", "x = x + brightness")],
    ),
    (
        "hardly any contrast",
        "test_diff_augment",
        [("(contrast + 0.5) *", "(contrast / 20 + 0.02) *")],
    ),
    (
        "a turn and a half across the image, not half a turn",
        "test_position_embedding_starts_smooth",
        [("frequency: float = math.pi / 2", "frequency: float = 3 * math.pi / 2")],
    ),
    (
        "a discriminator that stays in evaluation, where nothing follows σ",
        "test_step_follows_sigma_and_the_half_life",
        [("    d.train()\n    run.", "    run.")],
    ),
    (
        "σ followed in the generator's half too",
        "test_step_follows_sigma_and_the_half_life",
        [("    d.eval()  # σ is", "    # σ is")],
    ),
    (
        "an average of another half-life than was asked for",
        "test_step_follows_sigma_and_the_half_life",
        [("update_average(run.average, g, config.ema_half_life,", "update_average(run.average, g, config.ema_half_life / 100,")],
    ),
    (
        "an untrained generator that paints at full contrast",
        "test_generator",
        [("        nn.init.normal_(self.rgb.linear.weight, std=0.1)", "        #")],
    ),
    (
        "R1 as the slope of the mean logit",
        "test_slope_penalty",
        [("discriminator(images, **c).sum(), images", "discriminator(images, **c).mean(), images")],
    ),
    (
        "R1 that no gradient passes through",
        "test_slope_penalty",
        [("slope.square().sum((1, 2, 3)).mean()", "(slope.detach().square().sum((1, 2, 3)).mean() + 0 * discriminator(images).sum())")],
    ),
    (
        "groups of images far apart, so that real and generated ones meet",
        "test_minibatch_deviation",
        [("h[: 4 * whole].unflatten(0, (whole, 4))", "h[: 4 * whole].unflatten(0, (4, whole)).transpose(0, 1)")],
    ),
    (
        "the same: one pass of 4B images is then not four passes",
        "test_stylegan2_discriminator",
        [("h[: 4 * whole].unflatten(0, (whole, 4))", "h[: 4 * whole].unflatten(0, (4, whole)).transpose(0, 1)")],
    ),
    (
        "the deviation of a sample, not of the group",
        "test_minibatch_deviation",
        [("var(1, correction=0)", "var(1, correction=1)")],
    ),
    (
        "a blur that moves the image",
        "test_blur",
        [("        taps = torch.tensor([1.0, 3.0,", "        taps = torch.tensor([3.0, 1.0,")],
    ),
    (
        "a blur that brightens",
        "test_blur",
        [("3.0, 1.0]) / 8\n        self", "3.0, 1.0]) / 4\n        self")],
    ),
    (
        "a convolution scaled by its channels only",
        "test_equalized_convolution_keeps_size",
        [("unflatten(1, (-1, self.kernel, self.kernel))", "unflatten(1, (-1, self.kernel, self.kernel)) * self.kernel")],
    ),
    (
        "a convolution whose axes are exchanged",
        "test_equalized_convolution_keeps_size",
        [("unflatten(1, (-1, self.kernel, self.kernel))", "unflatten(1, (self.kernel, self.kernel, -1)).permute(0, 3, 1, 2)")],
    ),
    (
        "the skip left out",
        "test_residual_block_is_its_formula",
        [("return (y + self.skip(self.blur(x, padding=1, stride=2))) / math.sqrt(2)", "return y / math.sqrt(2)")],
    ),
    (
        "a sum of two that is not divided by √2",
        "test_residual_block_is_its_formula",
        [("(self.blur(x, padding=1, stride=2))) / math.sqrt(2)", "(self.blur(x, padding=1, stride=2)))")],
    ),
    (
        "pixels skipped without a blur",
        "test_residual_block_is_its_formula",
        [("self.skip(self.blur(x, padding=1, stride=2))", "self.skip(x[:, :, ::2, ::2])")],
    ),
    (
        "LeakyReLU without its gain",
        "test_residual_block_is_its_formula",
        [("return math.sqrt(2) * F.leaky_relu(x, 0.2)", "return F.leaky_relu(x, 0.2)")],
    ),
    (
        "an activation after the head",
        "test_stylegan2_discriminator",
        [("return self.head(leaky(self.linear(h.flatten(1))))[:, 0]", "return leaky(self.head(leaky(self.linear(h.flatten(1))))[:, 0])")],
    ),
    (
        "tokens laid out wrongly",
        "test_conv_decoder",
        [("y.transpose(1, 2).unflatten(2, (side, side))", "y.reshape(len(y), -1, side, side)")],
    ),
    (
        "the plain step without R1",
        "test_fast_step_is_the_plain_step_with_other_networks",
        [("consistency = consistency + run.penalty(real, **real_c)", "run.penalty(real, **real_c)")],
    ),
    (
        "R1 in the fast step not sixteen times",
        "test_fast_step_is_the_plain_step_with_other_networks",
        [("real, more=self.penalty, **c)", "real, more=lambda *real: self.penalty(*real) / R1_EVERY, **c)")],
    ),
    (
        "no sine in the patch decoder",
        "test_siren_paints_one_continuous_patch",
        [("x = torch.sin(self.omega_0 * layer(x, y))", "x = self.omega_0 * layer(x, y)")],
    ),
    (
        "no GELU between the two layers of the MLP",
        "test_generator_block_is_its_two_equations",
        [("self.down(F.gelu(self.up(h)))", "self.down(self.up(h))")],
    ),
    (
        "a generator that paints all patches alike",
        "test_generator",
        [("self.position = waves(dim)", "self.position = waves(dim, 0.0)")],
    ),
    (
        "a mapping network that learns as fast as the rest",
        "test_mapping_network",
        [("lr_multiplier=0.01", "lr_multiplier=1.0")],
    ),
    (
        "position waves of several turns",
        "test_position_embedding_starts_smooth",
        [("frequency: float = math.pi / 2)", "frequency: float = 4 * math.pi)")],
    ),
    (
        "the first augmentation only",
        "test_diff_augment",
        [("        images = AUGMENTATIONS[name](images)", "        return AUGMENTATIONS[name](images)")],
    ),
    (
        "an augmentation without contrast",
        "test_diff_augment",
        [("return middle + (contrast + 0.5) * (x - middle)", "return x")],
    ),
    (
        "what is moved out on one side comes in on the other",
        "test_diff_augment",
        [("F.pad(x, [most] * 4)[", 'F.pad(x, [most] * 4, mode="circular")[')],
    ),
    (
        "patches column by column",
        "test_overlapping_patches",
        [("images, kernel_size=2 * p, stride=p, padding=p // 2).transpose(1, 2)",
          "images.mT, kernel_size=2 * p, stride=p, padding=p // 2).transpose(1, 2)"
          ".unflatten(2, (3, 2 * p, 2 * p)).mT.flatten(2)")],
    ),
    (
        "no gradient through σ",
        "test_improved_spectral_norm_starts_exact",
        [("sigma = self.u.clone() @ (weight @ self.v.clone())", "sigma = self.u.clone() @ (weight.detach() @ self.v.clone())")],
    ),
    (
        "no residual in the discriminator's block",
        "test_discriminator",
        [("return h + self.mlp(self.norm2(h))  #", "return self.mlp(self.norm2(h))  #")],
    ),
    (
        "an average that never moves",
        "test_each_half_of_a_step_trains_its_own_network",
        [("    update_average(run.average, g, config", "    0 and update_average(run.average, g, config")],
    ),
    (
        "old gradients of the plain step not thrown away",
        "test_fast_step_is_the_plain_step",
        [("    run.optimizer_d.zero_grad()\n", "")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("name, check, edits", MISTAKES, ids=[name for name, _, _ in MISTAKES])
def test_mistake_is_caught(name, check, edits):
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"the edit no longer fits: {old}"
        source = source.replace(old, new)
    with pytest.raises((AssertionError, RuntimeError, KeyError)) as caught:
        getattr(module_from(source), check)()
    if not isinstance(caught.value, AssertionError):
        assert "state_dict" in str(caught.value) or "optimizer" in str(caught.value), caught.value
