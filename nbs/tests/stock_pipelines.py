"""The loops of all stock pipelines of the installed diffusers, with networks that are stand-ins.

A pipeline is built from the annotations of its `__init__`: real schedulers, and networks and
encoders of the annotated classes without layers, with the configuration of their defaults. The
code of `__call__` is the library's own; only prompts are encoded by a stand-in.
"""

import ast
import csv
import inspect
import re
import signal
import textwrap
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import nn

from neuralsolver.pipelines import scheduler_for

STEPS = 5
SIZE = 64
SD = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, steps_offset=1)


class Out(tuple):
    "What a network returns, under whatever name it is asked for."

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return self[0]

    def __getitem__(self, key):
        return super().__getitem__(0 if isinstance(key, str) else key)


class Encoded(SimpleNamespace):
    "What an autoencoder returns."

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else self.latent_dist


NEEDED = dict(
    spatial_compression_ratio=8,
    temporal_compression_ratio=4,
    latent_channels=16,
    in_channels=16,
    out_channels=16,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)


def _arguments_of_init(cls):
    "Defaults of the arguments of a network."
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return given | {
        p.name: NEEDED[p.name] for p in parameters if p.name in NEEDED and p.default is p.empty
    }


def _simple_attributes(net, cls, config):
    "The plain numbers that `__init__` computes from its arguments."
    module = inspect.getmodule(inspect.unwrap(cls.__init__))
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.__init__)))
    names = dict(vars(module)) | config | {'self': net}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and not re.search(r'nn\.|[A-Z]\w+\(', ast.unparse(node)):
            try:
                exec(ast.unparse(node), names)
            except Exception:
                pass


def _channels(net, x):
    "Channels of the output."
    config = net.config
    own = config.get('in_channels')
    axis = -1 if x.ndim <= 3 and 'Transformer' in type(net).__name__ else min(1, x.ndim - 1)
    if x.ndim == 6:  # pictures first
        axis = 2
    if re.match('Kandinsky[56]', type(net).__name__):
        axis = -1
    if x.ndim == 5 and x.shape[1] != own and x.shape[2] == own:
        axis = 2  # frames first
    out = config.get('out_channels') or own or x.shape[axis]
    exact = config.get('exact')
    if x.ndim == 3 and axis == -1 and not exact and x.shape[-1] % out == 0:
        out = x.shape[-1]  # packed tokens
    return axis, out if isinstance(out, int) else x.shape[axis]


def _forward(net, *args, **kwargs):
    "A smooth function of the state with as many channels as the network has."
    given = [*args, *kwargs.values()]
    if isinstance(given[0], list):  # Z-Image: one a sample, after its pictures if it has some
        states = [v[-1] if isinstance(v, list) else v for v in given[0]]
        return Out(([torch.tanh(v) for v in states],))
    if 'vision_tokens' in kwargs:  # Cosmos 3
        return Out(([torch.tanh(v) for v in kwargs['vision_tokens']], None, None))
    floats = (v for v in given if torch.is_tensor(v) and v.is_floating_point() and v.ndim > 1)
    x = next(floats, torch.zeros(1, 7, 32))
    if 'ControlNet' in type(net).__name__:
        return Out(([torch.zeros(1)], torch.zeros(1)))
    if 'Adapter' in type(net).__name__:
        return [torch.zeros(1)]
    if net.config.get('doubled'):  # Shap-E drops a variance
        return Out((torch.cat([torch.tanh(x), x], -1),))
    axis, channels = _channels(net, x)
    out = torch.tanh(x)
    while out.shape[axis] < channels:
        out = torch.cat([out, 0.5 * out], axis)
    out = out.narrow(axis, 0, channels)
    audio = kwargs.get('audio_hidden_states')
    if 'kv_cache_mode' in kwargs:
        return Out((out[:, kwargs.get('num_ref_tokens') or 0 :], None))
    return Out((out,) if audio is None else (out, torch.tanh(audio)))


BORROWED = (  # by controlnets of Z-Image
    't_embedder all_x_embedder cap_embedder rope_embedder noise_refiner context_refiner '
    'x_pad_token cap_pad_token'
).split()


class Rope(nn.Module):
    "Positions, which no stand-in reads."

    def prepare_video_coords(self, *args, **kwargs):
        return torch.zeros(1, 3, 1, 2)

    def prepare_audio_coords(self, *args, **kwargs):
        return torch.zeros(1, 1, 1, 2)


def _factor(vae, name, default):
    value = getattr(vae, name, None) or vae.config.get(name) or default
    return value if isinstance(value, int) else default


def _spatial(vae):
    blocks = vae.config.get('block_out_channels') or vae.config.get('encoder_block_out_channels')
    return _factor(vae, 'spatial_compression_ratio', 2 ** (len(blocks or [0] * 4) - 1))


def _encode(vae, x, *args, **kwargs):
    "Latents of the shape that the pipeline's own sizes ask for."
    channels = vae.config.get('latent_channels') or vae.config.get('z_dim') or 4
    s, t = _spatial(vae), _factor(vae, 'temporal_compression_ratio', 4)
    shape = [len(x), channels, *x.shape[2:]]
    shape[-2:] = [max(1, n // s) for n in shape[-2:]]
    if x.ndim == 5:
        shape[2] = (x.shape[2] - 1) // t + 1
    latents = torch.linspace(-1, 1, int(np.prod(shape))).view(shape)
    latent = SimpleNamespace(
        sample=lambda *a, **k: latents, mode=lambda *a, **k: latents, mean=latents, latents=latents
    )
    return Encoded(latent_dist=latent, latents=latents, latent=latents)


def _decode(vae, z, *args, **kwargs):
    return Out((torch.tanh(z[:, :3] if z.ndim == 4 else z),))


FILLED = dict(  # instead of None
    shift_factor=0.0,
    scaling_factor=1.0,
    sample_size=SIZE // 8,
    addition_time_embed_dim=256,
    in_channels=4,
    patch_size=2,
    sample_height=SIZE // 8,
    sample_width=SIZE // 8,
)


def network(cls, **changed):
    "A network of a class of diffusers, without layers."

    class Stub(cls):
        dtype = torch.float32
        device = torch.device('cpu')
        forward = _forward
        encode = _encode
        decode = _decode

        def __init__(self):
            nn.Module.__init__(self)

    net = Stub()
    Stub.__name__ = cls.__name__
    Stub.__module__ = cls.__module__
    config = _arguments_of_init(cls) | changed
    for name, value in FILLED.items():
        if name in config and config[name] is None:
            config[name] = value
    ConfigMixin.register_to_config(net, **config)
    net.transformer_blocks = net.single_transformer_blocks = nn.ModuleList()
    net.bn = nn.BatchNorm2d(128)
    net._cached_conv_counts = dict(encoder=0, decoder=0)
    net.rope = net.audio_rope = Rope()
    net.max_seq = 128
    for name in BORROWED:
        setattr(net, name, 128)
    net.silence_latent = torch.zeros(1, 4000, 64)
    net.clip_mean, net.clip_std = torch.zeros(1), torch.ones(1)
    if 'latents_mean' not in config:
        channels = config.get('latent_channels', 1)
        net.latents_mean, net.latents_std = torch.zeros(channels), torch.ones(channels)
    _simple_attributes(net, cls, config)
    return net


class Embedded(Out):
    "What an encoder returns; embeddings of a whole text or image are vectors."

    def __getattr__(self, name):
        if name in ('image_embeds', 'text_embeds', 'pooler_output'):
            return torch.zeros(1, 32)
        return super().__getattr__(name)

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


class Tokens(dict):
    "What a tokenizer returns."

    input_ids = torch.ones(1, 16, dtype=torch.long)
    attention_mask = torch.ones(1, 16, dtype=torch.long)

    def __getitem__(self, key):
        return getattr(self, key)

    def to(self, *args, **kwargs):
        return self


class Tokenizer:
    "Something that makes tokens of texts."

    model_max_length = 16
    size = {'height': 32, 'width': 32}
    pad_token_id = eos_token_id = 0

    def __call__(self, *args, **kwargs):
        return Tokens()

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return MagicMock()


class Encoder(nn.Module):
    "Something of transformers."

    def __init__(self):
        super().__init__()
        self.dtype = torch.float32
        self.device = torch.device('cpu')
        self.config = MagicMock(
            hidden_size=32, projection_dim=32, image_size=32, patch_size=4, d_model=32
        )

    def __getattr__(self, name):
        if name.startswith('_'):
            return super().__getattr__(name)
        return MagicMock()

    def forward(self, *args, **kwargs):
        if args and torch.is_tensor(args[0]) and args[0].is_floating_point() and args[0].ndim == 1:
            return torch.zeros(len(args[0]), 32)  # a duration
        batch = len(args[0]) if args and torch.is_tensor(args[0]) else 1
        embeds = torch.zeros(batch, 7, 32)
        return Embedded((embeds, embeds, torch.ones(batch, 7)))

    def get_image_features(self, *args, **kwargs):
        return torch.zeros(1, 32)


def scheduler(annotation):
    "The first scheduler that an annotation allows, with the values that its pipelines use."
    if annotation in ('SchedulerMixin', '_empty'):
        return diffusers.FlowMatchEulerDiscreteScheduler()
    for name in re.findall(r'\w+', annotation):
        cls = getattr(diffusers, name, None)
        if name == 'KarrasDiffusionSchedulers':
            return diffusers.DDIMScheduler(**SD)
        if inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin):
            if name == 'DPMSolverMultistepScheduler':
                return cls(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
            if name == 'UniPCMultistepScheduler':
                return cls(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
            if name == 'DDPMScheduler':
                return cls(**SD)
            return cls()
    raise ValueError(f'no scheduler in {annotation}')


PLAIN = {
    'ACE': dict(num_train_timesteps=1),
    'AceStepPipeline': dict(num_train_timesteps=1),
    'OmniGenPipeline': dict(invert_sigmas=True, num_train_timesteps=1),
    'MochiPipeline': dict(invert_sigmas=True),
    'LongCatAudioDiTPipeline': dict(invert_sigmas=True),
    'IFPipeline': dict(thresholding=True, variance_type='learned_range'),
    'HeliosPipeline': dict(stages=1),
    'Cosmos2TextToImagePipeline': dict(use_karras_sigmas=True),
    'Cosmos2VideoToWorldPipeline': dict(use_karras_sigmas=True),
}


LEARNED = {  # networks that return a variance too, or take more than the state
    'LatentConsistency': dict(time_cond_proj_dim=32),
    'StableDiffusionInstructPix2Pix': dict(in_channels=8),
    'StableDiffusionXLInstructPix2Pix': dict(in_channels=8),
    'StableDiffusionUpscale': dict(in_channels=7),
    'StableDiffusionLatentUpscale': dict(in_channels=8, out_channels=5),
    'LDMSuperResolution': dict(in_channels=6, out_channels=3),
    'StableDiffusionDepth2Img': dict(in_channels=5),
    'StableVideoDiffusion': dict(in_channels=8),
    'Marigold': dict(in_channels=8),
    'KandinskyV22Inpaint': dict(in_channels=9, out_channels=8),
    'IFSuper': dict(in_channels=6, out_channels=6),
    'IFImg2ImgSuper': dict(in_channels=6, out_channels=6),
    'IFInpaintingSuper': dict(in_channels=6, out_channels=6),
    'IF': dict(in_channels=3, out_channels=6),
    'KandinskyV22': dict(out_channels=8),
    'KandinskyPipeline': dict(out_channels=8),
    'KandinskyImg2Img': dict(out_channels=8),
    'KandinskyInpaint': dict(in_channels=9, out_channels=8),
}


TRANSFORMERS = {  # as above, for transformers
    'BriaFiboEdit': dict(in_channels=16),
    'ChromaInpaint': dict(guidance_embeds=False),
    'CogView4Control': dict(in_channels=32, out_channels=16),
    'Cosmos2VideoToWorld': dict(in_channels=17, out_channels=16),
    'Cosmos2_5': dict(in_channels=17, out_channels=16),
    'CosmosVideoToWorld': dict(in_channels=17, out_channels=16),
    'EasyAnimate': dict(in_channels=16, out_channels=16),
    'ErnieImage': dict(text_in_dim=32),
    'FluxControlNet': {},
    'FluxControl': dict(in_channels=128, out_channels=64, exact=True),
    'FluxFill': dict(in_channels=384, out_channels=64, exact=True),
    'CogVideoXFunControl': dict(in_channels=32, out_channels=16),
    'CogVideoXImageToVideo': dict(in_channels=32, out_channels=16),
    'HunyuanDiT': dict(in_channels=4, out_channels=8),
    'HunyuanImageRefiner': dict(in_channels=128, out_channels=64),
    'HunyuanSkyreelsImage': dict(in_channels=32, out_channels=16),
    'JoyImageEdit': dict(in_channels=16, out_channels=16),
    'Kandinsky6': dict(in_visual_dim=16, out_visual_dim=16, out_channels=16),
    'Kandinsky5': dict(in_visual_dim=16, out_visual_dim=16, out_channels=16),
    'HunyuanVideoImageToVideo': dict(image_condition_type='latent_concat'),
    'Latte': dict(in_channels=4, out_channels=8),
    'LTX2DFR': dict(use_keyframes_abs_pos_embedding=True),
}


PRIORS = {
    'Kandinsky': dict(embedding_dim=32),
    'ShapE': dict(doubled=True),
    'StableCascade': dict(clip_image_in_channels=32),
    'StableUnCLIP': dict(embedding_dim=32),
}
DECODERS = {'StableCascade': dict(in_channels=4, out_channels=4)}


def _changed(table, cls):
    "The entry for a pipeline."
    return next((v for k, v in table.items() if cls.__name__.startswith(k)), {})


def component(name, parameter, cls):
    "A part of a pipeline."
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else str(annotation)
    text = getattr(annotation, '__name__', text) if inspect.isclass(annotation) else text
    if 'scheduler' in name:
        own = scheduler('SCMScheduler' if cls.__name__.startswith('SanaSprint') else text)
        extra = PLAIN.get(cls.__name__)
        return type(own).from_config(own.config, **extra) if extra else own
    found = [getattr(diffusers, n, None) for n in re.findall(r'\w+', text)]
    nets = [c for c in found if inspect.isclass(c) and issubclass(c, nn.Module)]
    # else a real one is made from the other; the other for the second
    nets.sort(
        key=lambda c: (
            'Motion' not in c.__name__,
            c.__name__ == 'AutoencoderDC',
            'LTX2Video' in c.__name__,
        )
    )
    if 'CosmosSafetyChecker' in text:
        return MagicMock(check_video_safety=lambda video: video)
    if parameter.default is not inspect.Parameter.empty and not (nets and name == 'transformer'):
        return parameter.default
    if nets:
        tables = dict(unet=LEARNED, transformer=TRANSFORMERS, transformer_2=TRANSFORMERS)
        tables |= dict(prior=PRIORS, prior_prior=PRIORS, decoder=DECODERS)
        changed = _changed(tables.get(name, {}), cls)
        if nets[0].__name__ == 'AutoencoderKL':
            flow = 'FlowMatch' in str(inspect.signature(cls.__init__))
            changed = dict(block_out_channels=(8,) * 4, latent_channels=16 if flow else 4)
        if nets[0].__name__ == 'VQModel':
            changed = dict(latent_channels=4)
        if nets[0].__name__ == 'LuminaNextDiT2DModel':
            changed = dict(in_channels=4, out_channels=8)
        if nets[0].__name__ == 'DiTTransformer2DModel':
            changed = dict(in_channels=4, out_channels=8)
        return network(nets[0], **changed)
    if name == 'guider':
        return diffusers.ClassifierFreeGuidance()
    if re.search(r'safety|watermark', name):
        return None
    if re.search(r'bool', text):
        return False
    if name == 'image_normalizer':
        return StableUnCLIPImageNormalizer(32)
    if re.search(r'tokenizer', name) and cls.__name__ != 'OmniGenPipeline':
        return Tokenizer()
    if re.search(r'tokenizer|processor|extractor', name):
        return MagicMock(model_max_length=16, size={'height': 32, 'width': 32})
    if re.search(r'\bint\b|float', text):
        return 1
    return Encoder()


HELPERS = (  # methods that are replaced
    r'^_?encode_(prompt|image$)|^check_inputs$|^_get_.*embeds|^_get_add_time_ids|^_set_pag_attn'
)


pipeline_class = diffusers.DiffusionPipeline


def build(cls):
    "A pipeline of stand-ins."
    parameters = dict(inspect.signature(cls.__init__).parameters)
    parameters.pop('self')
    parts = {name: component(name, p, cls) for name, p in parameters.items()}
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    for inner in [pipe, *(v for v in vars(pipe).values() if isinstance(v, pipeline_class))]:
        for name in dir(type(inner)):
            if re.search(HELPERS, name):
                setattr(inner, name, stand_in(getattr(type(inner), name), name))
    return pipe


def returned(function):
    "Names of what a method returns."
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    nodes = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value is not None]
    if not nodes:
        return None
    value = nodes[-1]
    return (
        [ast.unparse(v) for v in value.elts]
        if isinstance(value, ast.Tuple)
        else [ast.unparse(value)]
    )


def embedding(name):
    "A value for a returned name."
    if 'mask' in name:
        return torch.ones(1, 7)
    if 'ids' in name:
        return torch.zeros(7, 3)
    if re.search('pooled|image_embed|class(?!ifier)', name):
        return torch.zeros(1, 32)
    return torch.zeros(1, 7, 32)


def stand_in(function, name):
    "Replaces the encoding of prompts and the check of arguments."
    if name == 'check_inputs' and 'Marigold' in function.__qualname__:
        return lambda *args, **kwargs: 1  # image
    names = None if name in ('check_inputs', '_set_pag_attn_processor') else returned(function)
    values = None if names is None else tuple(embedding(n) for n in names)
    if 'Kandinsky' in function.__qualname__ and values is not None and len(values) == 3:
        values = (torch.zeros(1, 32), torch.zeros(1, 7, 32), torch.ones(1, 7))
    return lambda *args, **kwargs: values if values is None or len(values) > 1 else values[0]


IMAGE = PIL.Image.fromarray(np.tile(np.arange(SIZE, dtype=np.uint8)[:, None, None], (1, SIZE, 3)))
VALUES = {
    'prompt': 'a lighthouse',
    'prompts': ['a lighthouse'],
    'height': SIZE,
    'width': SIZE,
    'num_inference_steps': STEPS,
    'prior_num_inference_steps': STEPS,
    'output_type': 'latent',
    'num_frames': 9,
    'image': IMAGE,
    'images': IMAGE,
    'init_image': IMAGE,
    'control_image': IMAGE,
    'mask_image': IMAGE.convert('L'),
    'video': [IMAGE] * 9,
    'conditioning_frames': [IMAGE] * 9,
    'class_labels': [1],
    'batch_size': 1,
    'strength': 1.0,
    'ensemble_size': 1,
    'control_mode': 0,
    'processing_resolution': SIZE,
    'image_embeds': torch.zeros(1, 32),
    'negative_image_embeds': torch.zeros(1, 32),
    'hint': torch.zeros(1, 3, SIZE, SIZE),
    'original_image': IMAGE,
    'control_mask': IMAGE.convert('L'),
    'control_video': [IMAGE] * 9,
    'pose_video': [IMAGE] * 9,
    'face_video': [IMAGE] * 9,
    'image_embeddings': torch.zeros(1, 16, 24, 24),
    'audio': torch.zeros(1, 2, 65536),
    'reference_image': IMAGE,
    'condtioning_image': IMAGE,
    'source_subject_category': ['dog'],
    'target_subject_category': ['dog'],
    'latents': torch.zeros(1, 128, 2, 2, 2),
}
INSTEAD = {  # by the beginning of the name; None = not given
    'Helios': dict(num_frames=33, video=None, image=None),
    'GlmImage': dict(image=None),
    'PRX': dict(use_resolution_binning=False),
    'SkyReelsV2DiffusionForcingVideoToVideo': dict(overlap_history=1),
    'Kandinsky6SR': dict(video=torch.zeros(1, 9, 3, 256, 256)),
    'Kandinsky6TI2VA': dict(image=None),
    'EasyAnimateControl': dict(control_video=torch.zeros(1, 3, 9, SIZE, SIZE)),
    'EasyAnimateInpaint': dict(
        video=torch.zeros(1, 3, 9, SIZE, SIZE), mask_video=torch.zeros(1, 1, 9, SIZE, SIZE)
    ),
    'SanaSprint': dict(num_inference_steps=2),
    'LTX2DFRP': dict(num_frames=17),
    'StableAudio3Inpaint': dict(mask_start_seconds=0.0, mask_end_seconds=0.5),
    'Kandinsky5I2': dict(height=512, width=512),
    'QwenImageLayered': dict(output_type='pt'),
}
WANTED = (  # though they may be left out
    'num_inference_steps height width output_type prompt num_frames image mask_image video '
    'control_image class_labels ensemble_size control_mode processing_resolution original_image '
    'control_mask control_video conditioning_frames audio'
).split()


def arguments(cls):
    "What a pipeline is called with."
    accepted = inspect.signature(cls.__call__).parameters
    given = {}
    for name, parameter in accepted.items():
        wanted = parameter.default is parameter.empty or name in WANTED
        if name in VALUES and wanted:
            given[name] = VALUES[name]
    if re.match(r'Kandinsky(V22)?(?!\d).*|Consistency', cls.__name__):
        given['output_type'] = 'pt'
    for name, value in _changed(INSTEAD, cls).items():
        given[name] = value
    given = {name: value for name, value in given.items() if value is not None}
    if 'generator' in accepted:
        given['generator'] = torch.Generator().manual_seed(0)
    return given


@contextmanager
def limit(seconds):
    "TimeoutError after so many seconds."

    def stop(*args):
        raise TimeoutError(f'longer than {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ours(pipe):
    "Our scheduler for a pipeline; at equal times where the table lacks the noise levels."
    try:
        return scheduler_for(pipe)
    except ValueError as e:
        if "carry='time'" not in str(e):
            raise
        return scheduler_for(pipe, carry='time')


def run(pipe, seconds=40, twice=False):
    "'' if a pipeline runs to its end and makes finite numbers, twice the same, else why not."
    try:
        with limit(seconds), torch.no_grad():
            results = [_first(pipe(**arguments(type(pipe)))) for _ in range(1 + twice)]
        if torch.is_tensor(results[0]):
            if not torch.isfinite(results[0]).all():
                return 'numbers that are not finite'
            if not torch.equal(results[0], results[-1]):
                return 'the second run differs'
        return ''
    except Exception as e:
        where = e.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        file = Path(where.tb_frame.f_code.co_filename).name
        said = str(e).splitlines()[0][:250] if str(e) else ''
        return f'{type(e).__name__}: {said} @ {file}:{where.tb_lineno}'


def _first(result):
    return result[0] if hasattr(result, '__getitem__') else result


def classes():
    "The public pipelines of the library that can be imported here."
    found = []
    for name in sorted(dir(diffusers)):
        if name.endswith(('Pipeline', 'PipelineWrapper')) and not name.startswith(
            ('Flax', 'Onnx', 'Auto')
        ):
            cls = getattr(diffusers, name, None)
            module = getattr(cls, '__module__', '')
            if module.startswith('diffusers.pipelines') and 'deprecated' not in module:
                if (
                    issubclass(cls, diffusers.DiffusionPipeline)
                    and cls is not diffusers.DiffusionPipeline
                ):
                    found.append(cls)
    return found


def try_pipeline(cls):
    "A row of the table."
    row = dict(pipeline=cls.__name__, scheduler='', own='', ours='')
    try:
        with limit(20):
            pipe = build(cls)
    except Exception as e:
        return row | dict(own=f'not built: {type(e).__name__}: {str(e)[:120]}')
    own = getattr(pipe, 'scheduler', None)
    if own is None:
        return row | dict(own='has no scheduler of its own name')
    row['scheduler'] = type(own).__name__
    row['own'] = run(pipe) or 'runs'
    if row['own'] != 'runs':
        return row
    try:
        pipe.scheduler = ours(pipe)
    except Exception as e:
        return row | dict(ours=f'{type(e).__name__}: {str(e).splitlines()[0][:250]}')
    return row | dict(ours=run(pipe, twice=True) or 'runs')


def sweep(file=None, only=None, said=None):
    "All rows; written as CSV."
    rows = []
    for cls in classes():
        if only and cls.__name__ not in only:
            continue
        row = {k: ' '.join(v.split()) for k, v in try_pipeline(cls).items()}
        rows.append(row)
        if said:
            said(row)
    if file:
        with open(file, 'w', newline='') as f:
            table = csv.DictWriter(f, rows[0])
            table.writeheader()
            table.writerows(rows)
    return rows
