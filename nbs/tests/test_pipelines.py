"Pipelines without a download: trained ones, how any is called, and searches on their networks."

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import decoded

import neuralsolver as ns
from neuralsolver._pipeline_field import pipeline_field
from neuralsolver.checkpoints import Autoencoder
from neuralsolver.cifar import CIFAR_CLASSES
from neuralsolver.data import CLASSES
from neuralsolver.paths import DDPMPath
from neuralsolver.pipelines import TinyTransformer, generators, load_pipeline, prompt_arguments
from neuralsolver.pipelines import scheduler_for

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:diffusers.*')  # numpy 2


def seeded(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# the trained pipelines


def trained_latents(name, solver, guidance):
    "What the stock pipeline makes of three classes, and the noise that it starts from."
    pipe = load_pipeline(name)
    pipe.scheduler = scheduler_for(pipe, solver)
    arguments = dict(class_labels=[7, 8, 3], guidance_scale=guidance, num_inference_steps=8)
    noise = torch.cat([torch.randn(1, 1, 28, 28, generator=g) for g in generators(range(3))])
    return decoded(pipe, **arguments, generator=generators(range(3))), noise


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_fidelity_of_sit_tiny_in_the_stock_pipeline(guidance):
    "Against `sample` on the model itself, which knows nothing of diffusers."
    found, noise = trained_latents('sit-tiny', 'sit-xl-2', guidance)
    field, labels = ns.Field(ns.load_model('sit-tiny'), guidance=guidance), torch.tensor([7, 8, 3])
    expected = ns.sample(field, noise, ns.load_solver('sit-xl-2', 8), labels)
    assert (found - expected).abs().max() < 1e-5


def test_fidelity_of_dit_tiny_in_the_stock_pipeline():
    "Trained on the continuous path, in a pipeline on the table: both at equal log-SNR."
    found, noise = trained_latents('dit-tiny', 'dit-xl-2', 1.0)
    field, labels = ns.Field(ns.load_model('dit-tiny')), torch.tensor([7, 8, 3])
    gap = found - ns.sample(field, noise, ns.load_solver('dit-xl-2', 8), labels)
    # float32 log-SNR of the translated times, divided by alpha = .0067 at the start
    assert gap.abs().max() < 5e-4 and gap.square().mean().sqrt() < 1e-4


def test_fidelity_of_translated_indices():
    "TinyTransformer, at equal log-SNR; everything beyond the classes is the null class."
    model, x, y = ns.load_model('dit-tiny'), seeded(0, 2, 1, 28, 28), torch.tensor([1, 2])
    net = TinyTransformer('dit-tiny').eval()
    net.net.load_state_dict(model.state_dict())
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[499]
    t = np.roots([19.9 / 2, 0.1, np.log(alpha_bar)]).max()  # exp(-(.1 t + 9.95 t^2)) = alpha_bar
    with torch.no_grad():
        found = net(x, torch.tensor([499, 499]), y).sample
        expected = model(x, torch.full((2,), 1000 * t, dtype=torch.float32), y)
        assert torch.allclose(found, expected, atol=1e-4)
        null, ten = (
            net(x, torch.tensor([9.0, 9.0]), torch.tensor([label, 10])).sample[0]
            for label in (1000, 10)
        )
        assert torch.equal(null, ten)


def test_fidelity_of_the_latent_pipeline_to_sample_and_decode():
    "Its noise has the shape of latents, and its pictures are decoded."
    pipe = load_pipeline('sit-cifar')
    pipe.scheduler = scheduler_for(pipe, 'sit-cifar')
    arguments = prompt_arguments(pipe, ['horse', 'ship'], 2.0)
    arguments |= dict(num_inference_steps=5, generator=generators(range(2)), output_type='np')
    found = torch.from_numpy(pipe(**arguments).images).permute(0, 3, 1, 2)
    noise = torch.cat([torch.randn(1, 6, 8, 8, generator=g) for g in generators(range(2))])
    field, labels = ns.Field(ns.load_model('sit-cifar'), guidance=2.0), torch.tensor([7, 8])
    latents = ns.sample(field, noise, ns.load_solver('sit-cifar', 5), labels)
    expected = Autoencoder('vae-cifar', scale=1.0).decode(latents) / 2 + 0.5
    assert found.shape == (2, 3, 32, 32) and found.std() > 0.1
    assert (found - expected.clamp(0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize('name, classes', [('dit-tiny', CLASSES), ('sit-cifar', CIFAR_CLASSES)])
def test_saved_trained_pipeline_has_its_class_names(name, classes, tmp_path):
    load_pipeline(name).save_pretrained(tmp_path)
    saved = load_pipeline(str(tmp_path))
    assert saved.labels == {c: i for i, c in enumerate(classes)}
    of_both = (p.state_dict() for p in (load_pipeline(name).transformer, saved.transformer))
    assert all(torch.equal(a, b) for a, b in zip(*(d.values() for d in of_both)))


# calling pipelines


def test_noise_of_a_sample_depends_on_its_index_and_the_seed():
    def draw(indices, seed=0):
        return torch.cat([torch.randn(1, 5, generator=g) for g in generators(indices, seed)])

    assert torch.equal(draw([3, 1, 2])[0], draw([3])[0])
    assert not torch.equal(draw([3]), draw([3], 1)) and not torch.equal(draw([0]), draw([1]))
    assert not torch.equal(draw([1_000_002]), draw([0], 1))  # neighbours in the seed space
    for indices, seed, said in ([-1], 0, 'index'), ([0], -1, 'seed'), ([1_000_003], 0, 'index'):
        with pytest.raises(ValueError, match=f'{said}=.* is not allowed'):
            generators(indices, seed)
    with pytest.raises(ValueError, match='seed=4294'):
        generators([0], 4294)


def test_embedding_of_a_prompt_depends_on_its_text():
    pipe = load_pipeline('random-sd3')
    a, b = (prompt_arguments(pipe, p)['prompt_embeds'] for p in (['a cat', 'a dog'], ['a dog']))
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])


def test_random_weights_depend_on_the_seed():
    def weight(seed):
        return next(load_pipeline('random-flux', seed=seed).transformer.parameters())

    state = torch.random.get_rng_state()
    assert torch.equal(weight(0), weight(0)) and not torch.equal(weight(0), weight(1))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    'name, arguments, message',
    [
        ('dit-tiny', dict(prompts=['10']), 'prompts: .10. is no class'),
        ('dit-tiny', dict(prompts=['Bag'], size=64), 'size=64 .* one size'),
        ('random-dit', dict(prompts=['1000']), 'prompts: .*numbers below 1000'),
    ],
)
def test_refused_prompt_or_size_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_arguments(load_pipeline(name), **arguments)


def test_refused_noise_for_a_prompt_of_a_real_network():
    pipe = load_pipeline('random-sd3')
    pipe.transformer.register_module('large', torch.nn.Linear(1000, 1000))
    with pytest.raises(ValueError, match='no text encoder'):
        prompt_arguments(pipe, ['a cat'])


def test_refused_device_is_named():
    with pytest.raises(ValueError, match='device='):
        load_pipeline('random-dit', device='gpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='device=.cuda.*no CUDA'):
            load_pipeline('random-dit', device='cuda')


# searches on a pipeline's network


@pytest.mark.parametrize(
    'name, start, prompts',
    [
        ('random-flux', 'euler', ['a cat', 'a dog']),
        ('random-dit', 'ddim', ['1', '2']),
        ('sit-tiny', 'euler', ['Bag', 'Coat']),
    ],
)
def test_search_on_a_pipelines_network(name, start, prompts):
    "Better than its start, the same with recomputed activations; its scheduler runs."
    pipe = load_pipeline(name)
    net = pipe.transformer.requires_grad_(False)

    def arguments(prompts):
        return prompt_arguments(pipe, prompts, 1.0)

    field, shape = pipeline_field(pipe, prompts, scheduler_for(pipe, start), arguments)
    noise, rows = seeded(0, 12, *shape), torch.arange(12) % 2
    settings = dict(iterations=6, batch_size=4, eval_every=2, lr=0.02, race=0, start=start)
    if name == 'random-flux':
        net.enable_gradient_checkpointing()
    given = dict(steps=3, cond=rows, teacher=12, method='ours', progress=False) | settings
    kept, again = (
        ns.search(field, noise, **given, gradient_checkpointing=on) for on in (False, True)
    )
    assert kept.solver.digest == again.solver.digest
    assert min(kept.history['heldout_rmse']) < kept.history['heldout_rmse'][0]
    pipe.scheduler = scheduler_for(pipe, kept.solver)
    run = dict(num_inference_steps=3, generator=generators([0, 1]), output_type='np')
    assert np.isfinite(pipe(**arguments(prompts), **run).images).all()


# other pipelines


def embedded(prompts, *shape):
    "Embeddings that belong to prompts, by their length."
    return torch.stack([seeded(len(p), *shape) for p in prompts])


def check_field(pipe, ours, field, noise, rows, prompts, arguments):
    "The pipeline with our scheduler ends where `sample` on the field ends."
    pipe.scheduler = ours
    run = pipe(**arguments(prompts), latents=noise, num_inference_steps=6, output_type='latent')
    found = run.frames if hasattr(run, 'frames') else run.images
    with torch.no_grad():
        expected = ns.sample(field, noise, ours.solver_for(6), torch.tensor(rows))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fidelity_of_a_unet_with_nested_conditions():
    "Stable Diffusion XL: text embeddings and sizes come in a dictionary."
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=4,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        addition_embed_type='text_time',
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
    )
    table = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    own = diffusers.EulerDiscreteScheduler(**table)
    kind = diffusers.StableDiffusionXLPipeline
    pipe = quiet(kind(small_vae(), None, None, None, None, net.eval(), own))

    def arguments(p):
        texts = dict(prompt_embeds=embedded(p, 5, 16), pooled_prompt_embeds=embedded(p, 16))
        return texts | dict(guidance_scale=1.0, height=16, width=16)

    ours = scheduler_for(pipe, 'dit-xl-2', carry='time')
    assert ours.path == DDPMPath('scaled-linear', 0.00085, 0.012)
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, arguments)
    nested = {'added_cond_kwargs.text_embeds', 'added_cond_kwargs.time_ids'}
    assert nested | {'encoder_hidden_states'} <= set(field.conditions) and shape == (4, 8, 8)
    check_field(pipe, ours, field, seeded(5, 2, *shape), [1, 0], ['bb', 'a'], arguments)


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    ).eval()


def wan_network():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm='rms_norm_across_heads',
        rope_max_seq_len=32,
    ).eval()


def tiny_wan(**kwargs):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    flow = dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
    own = diffusers.UniPCMultistepScheduler(**flow)
    second = wan_network() if kwargs else None
    return quiet(diffusers.WanPipeline(None, None, vae, own, wan_network(), second, **kwargs))


def wan_arguments(prompts, scale=1.0):
    embeds = embedded(prompts, 5, 8)
    texts = dict(prompt_embeds=embeds, negative_prompt_embeds=0 * embeds)
    return texts | dict(height=16, width=16, num_frames=1, guidance_scale=scale)


def test_fidelity_of_wan():
    "Two transformers, and guidance in calls of its own."
    pipe = tiny_wan()
    ours = scheduler_for(pipe, 'sit-xl-2')
    assert ours.config.shift == 3
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, wan_arguments)
    check_field(pipe, ours, field, seeded(3, 2, *shape), [1, 0], ['bb', 'a'], wan_arguments)
    with pytest.raises(ValueError, match='2 network calls.*switch its guidance off'):
        pipeline_field(pipe, ['a', 'bb'], ours, lambda p: wan_arguments(p, 5.0))
    with pytest.raises(ValueError, match='2 networks'):
        pipeline_field(tiny_wan(boundary_ratio=0.9), ['a'], ours, wan_arguments)


def test_fidelity_of_qwen_image():
    "Always sends its default sigmas and mu; sizes of pictures come as a list, one a prompt."
    torch.manual_seed(0)
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = quiet(diffusers.QwenImagePipeline(own, vae.eval(), None, None, net.eval()))

    def arguments(p):
        mask = torch.ones(len(p), 7, dtype=torch.int64)
        texts = dict(prompt_embeds=embedded(p, 7, 16), prompt_embeds_mask=mask)
        return texts | dict(true_cfg_scale=1.0, height=32, width=32)

    with pytest.raises(ValueError, match='shift_terminal=0.02.*compose_shift'):
        scheduler_for(pipe, 'sit-xl-2', compose_shift=True)
    ours = scheduler_for(pipe, 'sit-xl-2')
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, arguments)
    assert 'img_shapes' in field.conditions and field.time_scale == 0.001
    noise, prompts = seeded(3, 3, *shape), ['bb', 'a', 'bb']
    check_field(pipe, ours, field, noise, [1, 0, 1], prompts, arguments)
    with pytest.raises(ValueError, match='sigmas from 1 to 0.1 .* are refused'):
        pipe(**arguments(['a']), sigmas=[1.0, 0.9, 0.5, 0.2, 0.1])


@pytest.mark.parametrize('kind', ['Img2Img', 'Inpaint'])
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_stable_diffusion_starts_in_the_middle(kind):
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
    ).eval()
    table = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    own = diffusers.DDIMScheduler(**table, clip_sample=False, steps_offset=1)
    cls = getattr(diffusers, f'StableDiffusion{kind}Pipeline')
    parts = small_vae(), None, None, net, own, None, None
    pipe, called = quiet(cls(*parts, requires_safety_checker=False)), []

    def listen(module, args, kwargs):
        called.append(float(args[1]))

    net.register_forward_pre_hook(listen, with_kwargs=True)
    texts = dict(prompt_embeds=seeded(0, 1, 5, 16), negative_prompt_embeds=torch.zeros(1, 5, 16))
    run = dict(image=torch.rand(1, 3, 16, 16), num_inference_steps=8, output_type='np')
    if kind == 'Inpaint':
        run |= dict(mask_image=torch.ones(1, 1, 16, 16), height=16, width=16)
    pipe.scheduler = scheduler_for(pipe, 'unipc-2')
    images = pipe(**texts, **run, strength=0.5).images
    assert np.isfinite(images).all() and called == pipe.scheduler.timesteps[4:].tolist()
    with pytest.raises(ValueError, match='strength'):
        pipe(**texts, **run, strength=0.05)
    with pytest.raises(ValueError, match="carry='time'"):
        scheduler_for(pipe, 'dit-xl-2')
