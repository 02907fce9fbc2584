"Pipelines without network, pictures from them, and the notebooks zero_shot, text_to_image and pipeline_search with small parameters."

import json
from dataclasses import replace
from functools import wraps
import numpy as np, pandas as pd, pytest, torch
import neuralsolver as ns
from neuralsolver.data import CLASSES
from neuralsolver.diffusers import FlowNeuralSolverScheduler, VPNeuralSolverScheduler
from neuralsolver._pipeline_field import pipeline_field
from neuralsolver.paths import DDPMPath
from neuralsolver.pipelines import (
    generators,
    load_pipeline,
    prompt_arguments,
    scheduler_for,
    TinyTransformer,
    trained_pipeline,
)
from neuralsolver.utils import data_file
from neuralsolver.zero_shot import check_renderings, make_scheduler, picture_files, read_image, render, Rendering
from neuralsolver.text_to_image import image_scores, reported_scores
from test_search_notebook import in_process
from test_inception import random_inception

SMALL = dict(pipeline='sit-tiny', prompts='Sneaker; Bag', steps='5')  # of all three notebooks


def latents(pipe, **arguments):
    "What DiTPipeline's decoder is given."
    decode, heard = pipe.vae.decode, []
    pipe.vae.decode = lambda z: heard.append(z) or decode(z)
    try:
        pipe(**arguments, output_type='np')
    finally:
        del pipe.vae.decode
    return heard[0]


def read_images(folder, count):
    return np.stack([read_image(f) for f in picture_files(folder, count)])


# the trained pipelines


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_sit_tiny_in_the_stock_pipeline_is_sit_tiny_in_sample(guidance):
    "Our scheduler in DiTPipeline, against `sample` on the model itself, which knows nothing of diffusers."
    pipe, net, labels = trained_pipeline('sit-tiny'), ns.load_model('sit-tiny'), [7, 8, 3]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(pipe, 'sit-xl-2')
    noise = torch.cat([torch.randn(1, 1, 28, 28, generator=g) for g in generators(range(3))])
    found = latents(
        pipe,
        class_labels=labels,
        guidance_scale=guidance,
        num_inference_steps=8,
        generator=generators(range(3)),
    )
    expected = ns.sample(
        ns.Field(net, guidance=guidance), noise, ns.load_solver('sit-xl-2', 8), torch.tensor(labels)
    )
    assert (found - expected).abs().max() < 1e-5


def test_dit_tiny_in_the_stock_pipeline_is_dit_tiny_in_sample():
    "The network was trained on the continuous path; the pipeline lives on the table. Both at equal log-SNR."
    pipe, net, labels = trained_pipeline('dit-tiny'), ns.load_model('dit-tiny'), [7, 8, 3]
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(pipe, 'dit-xl-2')
    noise = torch.cat([torch.randn(1, 1, 28, 28, generator=g) for g in generators(range(3))])
    found = latents(
        pipe,
        class_labels=labels,
        guidance_scale=1.0,
        num_inference_steps=8,
        generator=generators(range(3)),
    )
    expected = ns.sample(ns.Field(net), noise, ns.load_solver('dit-xl-2', 8), torch.tensor(labels))
    assert (
        (found - expected).abs().max() < 5e-4
    )  # float32 log-SNR of the translated times, divided by alpha = .0067 at the start
    assert (found - expected).square().mean().sqrt() < 1e-4


def test_tiny_transformer_translates_indices_at_equal_log_snr():
    net, x, y = (
        TinyTransformer('dit-tiny').eval(),
        torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1, 2]),
    )
    net.net.load_state_dict(ns.load_model('dit-tiny').state_dict())
    index = 499
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]  # the table, from numpy
    t = np.roots(
        [19.9 / 2, 0.1, np.log(alpha_bar)]
    ).max()  # exp(-(.1 t + 19.9 t^2 / 2)) = alpha_bar
    with torch.no_grad():
        found = net(x, torch.tensor([index, index]), y).sample
        assert torch.allclose(
            found,
            ns.load_model('dit-tiny')(x, torch.full((2,), 1000 * t, dtype=torch.float32), y),
            atol=1e-4,
        )
        assert torch.equal(
            net(x, torch.tensor([9.0, 9.0]), torch.tensor([1000, 10])).sample[0],
            net(x, torch.tensor([9.0, 9.0]), torch.tensor([10, 10])).sample[0],
        )


def test_a_saved_trained_pipeline_has_its_class_names(tmp_path):
    pipe = load_pipeline('dit-tiny')
    pipe.save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).labels == {c: i for i, c in enumerate(CLASSES)}


# calling pipelines


def test_a_sample_depends_on_its_index_and_the_seed_alone():
    draw = lambda indices, seed=0: torch.cat(
        [torch.randn(1, 5, generator=g) for g in generators(indices, seed)]
    )
    assert (
        torch.equal(draw([3, 1, 2])[0], draw([3])[0])
        and not torch.equal(draw([3]), draw([3], 1))
        and not torch.equal(draw([0]), draw([1]))
    )
    assert not torch.equal(draw([1_000_002]), draw([0], 1))  # neighbours in the seed space
    for bad in (
        dict(indices=[-1]),
        dict(indices=[0], seed=-1),
        dict(indices=[1_000_003]),
        dict(indices=[0], seed=4294),
    ):
        with pytest.raises(ValueError, match='is not allowed'):
            generators(**bad)


def test_a_prompt_has_one_embedding_whatever_stands_beside_it():
    pipe = load_pipeline('random-sd3')
    a, b = (prompt_arguments(pipe, p)['prompt_embeds'] for p in (['a cat', 'a dog'], ['a dog']))
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])


def test_random_weights_depend_on_the_seed_alone():
    weight = lambda seed: next(load_pipeline('random-flux', seed=seed).transformer.parameters())
    state = torch.random.get_rng_state()
    assert (
        torch.equal(weight(0), weight(0))
        and not torch.equal(weight(0), weight(1))
        and torch.equal(state, torch.random.get_rng_state())
    )


# the field of a pipeline, searched


@pytest.mark.parametrize('name', ['random-flux', 'random-pixart-sigma', 'sit-tiny'])
def test_search_on_a_pipelines_network(name):
    "It finds a better solver than its start, the same with recomputed activations, and the scheduler made from it runs in the pipeline."
    pipe = load_pipeline(name)
    prompts = ['Bag', 'Coat'] if name == 'sit-tiny' else ['a cat', 'a dog']
    flow = name != 'random-pixart-sigma'
    ours = scheduler_for(pipe, 'euler' if flow else 'ddim')
    pipe.transformer.requires_grad_(False)
    field, shape = pipeline_field(pipe, prompts, ours, lambda p: prompt_arguments(pipe, p, 1.0))
    noise, rows = (
        torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        torch.arange(12) % 2,
    )
    settings = dict(
        steps=3,
        noise=noise,
        cond=rows,
        teacher=12,
        iterations=6,
        batch_size=4,
        eval_every=2,
        lr=0.02,
        race=0,
        progress=False,
    )
    pipe.transformer.enable_gradient_checkpointing() if name == 'random-flux' else None
    kept, again = (ns.search(field, **settings, gradient_checkpointing=on) for on in (False, True))
    assert (
        kept.solver.digest == again.solver.digest
        and min(kept.history['heldout_rmse']) < kept.history['heldout_rmse'][0]
    )
    pipe.scheduler = scheduler_for(pipe, kept.solver)
    assert np.isfinite(
        pipe(
            **prompt_arguments(pipe, prompts, 1.0),
            num_inference_steps=3,
            generator=generators([0, 1]),
            output_type='np',
        ).images
    ).all()


def test_a_unet_with_nested_conditions_gives_its_field():
    "Stable Diffusion XL: text embeddings and sizes come in a dictionary."
    import diffusers

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
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    )
    own = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
    )
    pipe = diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, net.eval(), own)
    pipe.set_progress_bar_config(disable=True)
    embed = lambda p, *shape: torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(len(s))) for s in p]
    )
    arguments = lambda p: dict(
        prompt_embeds=embed(p, 5, 16),
        pooled_prompt_embeds=embed(p, 16),
        guidance_scale=1.0,
        height=16,
        width=16,
    )
    ours = scheduler_for(pipe, 'dit-xl-2', carry='time')
    assert ours.path == DDPMPath('scaled-linear', 0.00085, 0.012)
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, arguments)
    assert {
        'encoder_hidden_states',
        'added_cond_kwargs.text_embeds',
        'added_cond_kwargs.time_ids',
    } <= set(field.conditions) and shape == (4, 8, 8)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    pipe.scheduler = ours
    found = pipe(
        **arguments(['bb', 'a']), latents=noise, num_inference_steps=6, output_type='latent'
    ).images
    with torch.no_grad():
        expected = ns.sample(field, noise, ours.solver_for(6), torch.tensor([1, 0]))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# schedulers by name and pictures


@pytest.mark.parametrize(
    'name, own',
    [
        ('random-flux', 'FlowMatchEuler'),
        ('random-sd3', 'FlowMatchEuler'),
        ('random-sana', 'DPMSolverMultistep'),
        ('random-dit', 'DDIM'),
        ('random-pixart-sigma', 'DPMSolverMultistep'),
        ('sit-tiny', 'DPMSolverMultistep'),
    ],
)
def test_stock_schedulers_keep_the_family_and_the_shift(name, own, caplog):
    pipe = load_pipeline(name)
    flow = name in ('random-flux', 'random-sd3', 'random-sana', 'sit-tiny')
    assert type(make_scheduler(pipe, 'own')).__name__.startswith(own)
    for other in ('dpm++', 'unipc'):
        s = make_scheduler(pipe, other)
        assert (
            s.config.solver_order == 2 and (s.config.prediction_type == 'flow_prediction') == flow
        )
        if flow:
            assert s.config.use_flow_sigmas and s.config.flow_shift == (
                1.0 if name == 'sit-tiny' else 3.0
            )
        assert s.config.get('use_dynamic_shifting', False) == (name == 'random-flux')
    ours = make_scheduler(pipe, 'sit-xl-2+shift' if flow else 'dit-xl-2')
    assert isinstance(ours, FlowNeuralSolverScheduler if flow else VPNeuralSolverScheduler) and (
        not flow or ours.config.compose_shift
    )
    assert 'not expected' not in caplog.text
    with pytest.raises(ValueError, match='is not known'):
        make_scheduler(pipe, 'dpm')


def test_pictures_do_not_depend_on_batch_or_interruption(tmp_path):
    pipe = load_pipeline('random-sana')
    r = Rendering('random-sana', ('a', 'b', 'c', 'd', 'e'), 'sit-xl-2', 5, 4.5)
    whole = read_images(render(pipe, r, tmp_path / 'whole', batch_size=5, progress=False), 5)
    call, calls = type(pipe).__call__, []

    class Killed(Exception):
        pass

    @wraps(call)
    def dying(self, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return call(self, **kwargs)

    own = pipe.scheduler
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {'__call__': dying})
    with pytest.raises(Killed):
        render(pipe, r, tmp_path / 'parts', batch_size=2, progress=False)
    assert len(list((tmp_path / 'parts').glob('*.png'))) == 2 and pipe.scheduler is own
    parts = read_images(render(pipe, r, tmp_path / 'parts', batch_size=2, progress=False), 5)
    assert (
        np.abs(whole.astype(int) - parts).max() <= 1 and len(calls) == 4
    )  # 8-bit rounding at most


def test_more_prompts_may_follow_and_other_settings_may_not(tmp_path):
    pipe = load_pipeline('random-sana')
    r = Rendering('random-sana', ('a', 'b', 'c'), 'sit-xl-2', 5, 4.5)
    render(pipe, replace(r, prompts=('a', 'b')), tmp_path / 'x', progress=False)
    before = (tmp_path / 'x/000001.png').stat().st_mtime_ns
    render(pipe, r, tmp_path / 'x', progress=False)
    render(pipe, replace(r, prompts=('a',)), tmp_path / 'x', progress=False)
    assert (tmp_path / 'x/000001.png').stat().st_mtime_ns == before and len(
        list((tmp_path / 'x').glob('*.png'))
    ) == 3
    assert json.loads((tmp_path / 'x/protocol.json').read_text())['prompts'] == ['a', 'b', 'c']
    for other in (
        replace(r, prompts=('a', 'x')),
        replace(r, seed=1),
        replace(r, solver='flowdcn-b-2'),
        replace(r, guidance=2.0),
    ):
        with pytest.raises(ValueError, match='another run'):
            render(pipe, other, tmp_path / 'x', progress=False)


def test_what_a_pipeline_cannot_drive_is_refused_before_the_run():
    "FLUX.1-schnell's static shift, and diffusers' own assertion."
    pipe = load_pipeline('random-flux')
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, use_dynamic_shifting=False
    )
    own = pipe.scheduler
    with pytest.raises(ValueError, match=r'dpm\+\+ with 5 steps does not run in FluxPipeline'):
        check_renderings(pipe, [Rendering('x', ('a',), 'dpm++', 5)])
    assert pipe.scheduler is own
    check_renderings(
        pipe, [Rendering('x', ('a',), 'sit-xl-2+shift', 5), Rendering('x', ('a',), 'euler', 5)]
    )


@pytest.mark.parametrize(
    'solver, folder',
    [
        ('sit-xl-2+shift', 'sit-xl-2+shift-5'),
        ('out/my.json', 'out_my-5'),
        ('../a b.json+shift', '.._a_b+shift-5'),
        ('unipc-2@quadratic', 'unipc-2@quadratic-5'),
    ],
)
def test_folder_names(solver, folder):
    assert Rendering('x', ('a',), solver, 5).folder == folder


@pytest.mark.parametrize(
    'name, arguments, message',
    [
        ('dit-tiny', dict(prompts=['10']), 'is no class'),
        ('dit-tiny', dict(prompts=['Bag'], size=64), 'one size'),
        ('random-dit', dict(prompts=['1000']), 'numbers below 1000'),
    ],
)
def test_prompts_and_sizes_that_would_be_ignored_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        prompt_arguments(load_pipeline(name), **arguments)


def test_a_real_network_is_not_given_noise_for_a_prompt():
    pipe = load_pipeline('random-sd3')
    pipe.transformer.register_module('large', torch.nn.Linear(1000, 1000))
    with pytest.raises(ValueError, match='no text encoder'):
        prompt_arguments(pipe, ['a cat'])


def test_scores_are_of_the_samples_named(inception, tmp_path, monkeypatch):
    "A folder may hold more samples than this run's prompts."
    import neuralsolver.zero_shot as module

    seen = []
    monkeypatch.setattr(
        module,
        'image_scores',
        lambda files, *args, **kwargs: seen.append(len(files)) or {'FID': 1.0},
    )
    small = dict(
        table='coco',
        prompts='a; b; c',
        solvers='dit-xl-2',
        steps='5',
        per_prompt=1,
        reference=str(tmp_path),
        weights=str(inception[0]),
        reports_dir=str(tmp_path),
    )
    in_process('studies/text_to_image', **small)
    in_process('studies/text_to_image', **small | dict(limit=2))
    assert seen == [3, 2]


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match='device='):
        load_pipeline('random-dit', device='gpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='no CUDA'):
            load_pipeline('random-dit', device='cuda')


# Wan: two transformers, and guidance in calls of its own


def tiny_wan(**kwargs):
    import diffusers

    torch.manual_seed(0)

    def net():
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

    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    own = diffusers.UniPCMultistepScheduler(
        prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(None, None, vae, own, net(), net() if kwargs else None, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_arguments(prompts, scale=1.0):
    embed = torch.stack(
        [torch.randn(5, 8, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    )
    return dict(
        prompt_embeds=embed,
        negative_prompt_embeds=0 * embed,
        height=16,
        width=16,
        num_frames=1,
        guidance_scale=scale,
    )


def test_wan_runs_with_our_scheduler_and_gives_its_field():
    pipe = tiny_wan()
    ours = pipe.scheduler = scheduler_for(pipe, 'sit-xl-2')
    assert ours.config.shift == 3
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, wan_arguments)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    found = pipe(
        **wan_arguments(['bb', 'a']), latents=noise, num_inference_steps=6, output_type='latent'
    ).frames
    with torch.no_grad():
        expected = ns.sample(field, noise, ours.solver_for(6), torch.tensor([1, 0]))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match='2 network calls.*switch its guidance off'):
        pipeline_field(pipe, ['a', 'bb'], ours, lambda p: wan_arguments(p, 5.0))
    with pytest.raises(ValueError, match='2 networks'):
        pipeline_field(tiny_wan(boundary_ratio=0.9), ['a'], ours, wan_arguments)


# other pipelines that the README names, tiny


def test_qwen_image_runs_and_gives_its_field():
    "Always sends its default sigmas and mu; sizes of pictures come as a list, one a prompt."
    import diffusers

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
    pipe = diffusers.QwenImagePipeline(own, vae.eval(), None, None, net.eval())
    pipe.set_progress_bar_config(disable=True)
    embed = lambda p: torch.stack(
        [torch.randn(7, 16, generator=torch.Generator().manual_seed(len(s))) for s in p]
    )
    arguments = lambda p: dict(
        prompt_embeds=embed(p),
        prompt_embeds_mask=torch.ones(len(p), 7, dtype=torch.int64),
        true_cfg_scale=1.0,
        height=32,
        width=32,
    )
    ours = pipe.scheduler = scheduler_for(pipe, 'sit-xl-2')
    field, shape = pipeline_field(pipe, ['a', 'bb'], ours, arguments)
    assert 'img_shapes' in field.conditions and field.time_scale == 0.001
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
    found = pipe(
        **arguments(['bb', 'a', 'bb']), latents=noise, num_inference_steps=6, output_type='latent'
    ).images
    with torch.no_grad():
        expected = ns.sample(field, noise, ours.solver_for(6), torch.tensor([1, 0, 1]))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match='sigmas=.* are refused'):
        pipe(**arguments(['a']), sigmas=[1.0, 0.9, 0.5, 0.2, 0.1])
    with pytest.raises(ValueError, match='shift_terminal=0.02.*compose_shift'):
        scheduler_for(pipe, 'sit-xl-2', compose_shift=True)


@pytest.mark.parametrize(
    'kind', ['StableDiffusionImg2ImgPipeline', 'StableDiffusionInpaintPipeline']
)
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_stable_diffusion_starts_in_the_middle(kind):
    import diffusers

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
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    ).eval()
    own = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        clip_sample=False,
        steps_offset=1,
    )
    pipe = getattr(diffusers, kind)(
        vae, None, None, net, own, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    called = []
    net.register_forward_pre_hook(
        lambda m, args, kwargs: called.append(float(args[1])), with_kwargs=True
    )
    arguments = dict(
        image=torch.rand(1, 3, 16, 16),
        prompt_embeds=torch.randn(1, 5, 16),
        negative_prompt_embeds=torch.zeros(1, 5, 16),
        num_inference_steps=8,
        output_type='np',
    )
    if 'Inpaint' in kind:
        arguments |= dict(mask_image=torch.ones(1, 1, 16, 16), height=16, width=16)
    pipe.scheduler = scheduler_for(pipe, 'unipc-2')
    images = pipe(**arguments, strength=0.5).images
    assert np.isfinite(images).all() and called == pipe.scheduler.timesteps[4:].tolist()
    with pytest.raises(ValueError, match='larger strength|strength'):
        pipe(**arguments, strength=0.05)
    with pytest.raises(ValueError, match="carry='time'"):
        scheduler_for(pipe, 'dit-xl-2')


# scores of table 5


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    "Random weights: the real file cannot be downloaded here."
    path = random_inception(tmp_path_factory.mktemp('inception') / 'weights.pth')
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return path, FeatureExtractorInceptionV3(
        'inception-v3-compat', ['2048'], feature_extractor_weights_path=str(path)
    )


def folder_of(path, arrays):
    from PIL import Image

    path.mkdir()
    for i, a in enumerate(arrays):
        Image.fromarray(a).save(path / f'{i:06d}.png')
    return path


def test_image_scores_are_those_of_the_features(inception, tmp_path):
    weights, net = inception
    rng = np.random.default_rng(0)
    ours = [rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(12)]
    real = [np.clip(rng.normal(100, 20, (24, 24, 3)), 0, 255).astype(np.uint8) for _ in range(12)]
    a, b = folder_of(tmp_path / 'a', ours), folder_of(tmp_path / 'b', real)
    scores = image_scores(picture_files(a, 12), b, weights, batch_size=5)
    with torch.no_grad():
        f, g = (
            net(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2))[0].double().numpy()
            for x in (ours, real)
        )

    def distance(
        f, g
    ):  # of few rows: tr (S1 S2)^(1/2) is the sum of the singular values of the product of the centred rows
        one, two = ((v - v.mean(0)) / 11**0.5 for v in (f, g))
        return (
            ((f.mean(0) - g.mean(0)) ** 2).sum()
            + (one**2).sum()
            + (two**2).sum()
            - 2 * np.linalg.svd(one @ two.T, compute_uv=False).sum()
        )

    assert (
        scores['FID'] == pytest.approx(distance(f, g), rel=1e-4)
        and distance(f, g) > 1
        and set(scores) == {'FID', 'sFID', 'IS', 'PR', 'Recall'}
    )
    seen = []
    handle = net.Mixed_6d.register_forward_hook(lambda m, i, o: seen.append(o))  # one call a set
    with torch.no_grad():
        [net(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2)) for x in (ours, real)]
    handle.remove()
    f, g = (
        np.moveaxis(o[:, :7].double().numpy(), 1, 3).reshape(12, 17 * 17 * 7) for o in seen
    )  # ADM's order: row, column, channel
    assert scores['sFID'] == pytest.approx(distance(f, g), rel=1e-4) and distance(f, g) > 1
    same = image_scores(picture_files(a, 12), a, weights)
    assert abs(same['FID']) < 1e-3 and same['PR'] == same['Recall'] == 1


def test_real_images_of_other_sizes_are_fitted(tmp_path):
    from neuralsolver.text_to_image import _Pictures

    real = folder_of(
        tmp_path / 'b', [np.full((40, 60, 3), 7, np.uint8), np.full((90, 30), 9, np.uint8)]
    )
    assert [tuple(p.shape) for p in _Pictures(picture_files(real, 2), (24, 24))] == [
        (3, 24, 24)
    ] * 2


@pytest.mark.parametrize('where, rows', [('table 4', 24), ('table 5', 45)])
def test_reported_scores_are_in_the_file(where, rows):
    table = pd.read_csv(data_file('reported.csv'))
    assert (table['where'] == where).sum() == rows
    assert reported_scores(where, 'sit-xl-2', 8) == {} and len(
        reported_scores(where, 'dit-xl-2', 8)
    ) == (4 if where == 'table 4' else 5)


# the notebooks


def test_zero_shot_writes_its_files_and_goes_on(tmp_path):
    small = SMALL | dict(
        per_prompt=1,
        baselines='euler',
        solvers='sit-xl-2',
        reference_steps=6,
        reports_dir=str(tmp_path),
    )
    in_process('zero_shot', **small)
    table, card = (
        pd.read_csv(tmp_path / 'zero_shot_sit-tiny.csv'),
        json.loads((tmp_path / 'zero_shot_sit-tiny.json').read_text()),
    )
    assert (
        sorted(table.folder) == ['euler-5', 'sit-xl-2-5']
        and (table.samples == 2).all()
        and not card['random_weights']
    )
    first = read_images(tmp_path / 'zero_shot/sit-tiny/euler-5', 2) / 255
    last = read_images(tmp_path / 'zero_shot/sit-tiny/own-6', 2) / 255
    assert table.set_index('folder').rmse['euler-5'] == pytest.approx(
        np.sqrt(((first - last) ** 2).mean()), rel=1e-5
    )
    stamp = lambda: {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.png') if p.parent != tmp_path
    }
    before = stamp()
    in_process('zero_shot', **small)
    assert stamp() == before


def test_zero_shot_says_that_weights_are_random(tmp_path):
    in_process(
        'zero_shot',
        pipeline='random-flux',
        prompts='a; b',
        steps='5',
        per_prompt=1,
        baselines='euler',
        reference_steps=6,
        reports_dir=str(tmp_path),
    )
    card = json.loads((tmp_path / 'zero_shot_random-flux.json').read_text())
    assert (
        card['random_weights'] and 'sit-xl-2+shift' in card['schedulers']
    )  # Flux has a shift: both readings


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(steps='4'), 'There are tables for 5, 6, 7, 8, 9, 10 steps'),
        (dict(solvers='dit-xl-2'), 'belongs to VPPath'),
        (dict(steps='x'), 'steps='),
        (dict(prompts='a cat'), 'is no class'),
        (dict(prompts=';'), 'prompts='),
        (dict(prompts='none.txt'), 'does not exist'),
        (dict(baselines='ddim'), 'is not known'),
        (dict(solvers='sit-xl-2,sit-xl-2'), 'distinct'),
        (dict(baselines='own', reference_steps=5), 'twice'),
        (dict(dtype='int8'), 'dtype='),
        (dict(pipeline='no-such'), 'Nothing is fetched'),
        (dict(batch_size=0), 'batch_size='),
        (dict(download='true'), 'download='),
    ],
)
def test_zero_shot_refuses_before_it_writes(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        in_process('zero_shot', **SMALL | dict(reports_dir=str(tmp_path)) | change)
    assert not list(tmp_path.rglob('*.png'))


def test_text_to_image_renders_then_reads_scores(tmp_path):
    (tmp_path / 'prompts.jsonl').write_text(
        '{"tag": "position", "prompt": "a"}\n{"tag": "colors", "prompt": "b"}\n'
    )
    small = dict(
        prompts=str(tmp_path / 'prompts.jsonl'),
        solvers='dit-xl-2',
        steps='5',
        per_prompt=2,
        reports_dir=str(tmp_path),
        run='try',
    )
    in_process('studies/text_to_image', **small)
    out = tmp_path / 'text_to_image/try/geneval-dit-xl-2-5'
    assert len(list(out.rglob('*.png'))) == 4
    assert json.loads((out / '00001/metadata.jsonl').read_text())['tag'] == 'colors'
    (out / 'results.jsonl').write_text(
        '{"tag": "position", "correct": true}\n{"tag": "position", "correct": false}\n{"tag": "colors", "correct": true}\n'
    )
    in_process('studies/text_to_image', **small)
    scores = pd.read_csv(tmp_path / 'text_to_image_geneval_try.csv').set_index('metric')
    assert (
        scores.measured['Pos'] == 50
        and scores.measured['Overall'] == 0.75
        and scores.reported.isna().all()
    )  # random weights: nothing to set beside the paper
    for change, message in (
        (dict(table='table 4'), 'table='),
        (dict(reference='nowhere'), 'reference='),
        (dict(solvers='sit-xl-2'), 'belongs to'),
    ):
        with pytest.raises(ValueError, match=message):
            in_process('studies/text_to_image', **small | change)


def test_text_to_image_scores_coco(tmp_path, inception):
    rng = np.random.default_rng(0)
    real = folder_of(
        tmp_path / 'real', [rng.integers(0, 255, (40, 50, 3), dtype=np.uint8) for _ in range(10)]
    )
    (tmp_path / 'c.json').write_text(
        json.dumps(
            dict(
                annotations=[
                    dict(id=i, image_id=100 - i, caption=f'picture {i}') for i in range(10)
                ]
            )
        )
    )
    in_process(
        'studies/text_to_image',
        table='coco',
        prompts=str(tmp_path / 'c.json'),
        solvers='dit-xl-2',
        steps='5',
        per_prompt=1,
        reference=str(real),
        weights=str(inception[0]),
        reports_dir=str(tmp_path),
    )
    scores = pd.read_csv(tmp_path / 'text_to_image_coco_random-pixart-sigma.csv').set_index(
        'metric'
    )
    assert set(scores.index) == {'FID', 'sFID', 'IS', 'PR', 'Recall'} and scores.measured['FID'] > 0


def test_pipeline_search_makes_a_scheduler_that_loads(tmp_path, monkeypatch):
    small = SMALL | dict(
        steps='3,5',
        options='iterations=4, batch_size=4, eval_every=2',
        samples=8,
        heldout=4,
        teacher_steps=10,
        gradient_checkpointing=1,
        reports_dir=str(tmp_path),
    )
    pushed = []
    monkeypatch.setattr(
        FlowNeuralSolverScheduler,
        'push_to_hub',
        lambda self, repo, **kw: pushed.append((repo, self.solver_for(3).digest)),
    )
    in_process('studies/pipeline_search', **small, push_to_hub='me/solver')
    out = tmp_path / 'pipeline_search/sit-tiny'
    loaded = FlowNeuralSolverScheduler.from_pretrained(out / 'scheduler')
    found = {n: ns.load_solver(out / f'sit-tiny-{n}.json') for n in (3, 5)}
    assert {n: loaded.solver_for(n).digest for n in found} == {
        n: s.digest for n, s in found.items()
    } and pushed == [('me/solver', found[3].digest)]
    assert (
        found[5]
        .provenance['command']
        .startswith(
            "papermill nbs/studies/pipeline_search.ipynb -p pipeline sit-tiny -p prompts 'Sneaker; Bag' -p steps 5 -p method ours -p options 'iterations=4, batch_size=4, eval_every=2'"
        )
    )
    assert all(
        (found[n].provenance['iterations'], found[n].provenance['method']) == (4, 'ours')
        for n in found
    )
    table = pd.read_csv(tmp_path / 'pipeline_search/pipeline_search_sit-tiny.csv', index_col=0)
    card = json.loads((tmp_path / 'pipeline_search/pipeline_search_sit-tiny.json').read_text())
    assert (card['network'], card['method'], card['options']) == (
        'TinyTransformer',
        'ours',
        small['options'],
    ) and card['solvers'] == {str(n): s.digest for n, s in found.items()}
    assert (
        (table.searched <= table.euler + 1e-9).all()
        and np.isnan(table['sit-xl-2'][3])
        and table['sit-xl-2'][5] > 0
    )
    for change, message in (
        (dict(steps='5;6'), 'steps='),
        (dict(options='start=dit-xl-2, batch_size=4', steps='5'), 'coordinates on'),
        (dict(method='lion'), "method='lion'"),
        (dict(options=''), 'batch_size=32'),
        (dict(teacher_steps=4), 'teacher_steps=4'),
        (dict(gradient_checkpointing=2), 'gradient_checkpointing='),
    ):
        with pytest.raises(ValueError, match=message):
            in_process(
                'studies/pipeline_search',
                **small | dict(reports_dir=str(tmp_path / 'bad')) | change,
            )
