"Reports of users, each as its smallest case: identities by content, files as they are."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lion_pytorch import Lion as LibrarysLion
from PIL import Image

from neuralsolver.checkpoints import read_checkpoint
from neuralsolver.image_files import FolderImages
from neuralsolver.recipes import Lion
from neuralsolver.text_to_image import export_geneval, geneval_scores, read_prompts
from neuralsolver.utils import reports_root, write_json
from neuralsolver.zero_shot import pipeline_digest


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_lion_is_that_of_the_library_in_all_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator, dtype=dtype)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    optimizers = [Lion([ours], 0.01), LibrarysLion([theirs], lr=0.01)]
    for _ in range(200):
        ours.grad = torch.randn(5, 7, generator=generator, dtype=dtype)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def pictures(folder, value, count=2):
    "Grey pictures as `render` names them."
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / f'{i:06d}.png')
    return folder


def test_an_export_holds_the_pictures_just_made_and_drops_an_earlier_verdict(tmp_path):
    entries = [dict(prompt='a cat', tag='single_object')]
    out = export_geneval(pictures(tmp_path / 'im', 10), entries, tmp_path / 'geneval', 2)
    verdict = json.dumps(dict(tag='single_object', correct=True)) + '\n'
    (out / 'results.jsonl').write_text(2 * verdict)
    assert geneval_scores(out / 'results.jsonl')['Overall'] == 1
    export_geneval(tmp_path / 'im', entries, out, 2)
    assert (out / 'results.jsonl').exists()  # the same pictures: the verdict stays
    shutil.rmtree(tmp_path / 'im')
    export_geneval(pictures(tmp_path / 'im', 99), entries, out, 2)
    assert np.asarray(Image.open(out / '00000/samples/00000.png')).min() == 99
    assert not (out / 'results.jsonl').exists()


def test_a_verdict_on_fewer_pictures_is_refused(tmp_path):
    out = export_geneval(pictures(tmp_path / 'im', 1), [dict(prompt='a')], tmp_path / 'out', 2)
    (out / 'results.jsonl').write_text(json.dumps(dict(tag='position', correct=True)) + '\n')
    with pytest.raises(ValueError, match='1 verdicts, the export 2 pictures'):
        geneval_scores(out / 'results.jsonl')


class Pipe:
    "What the digest reads of a pipeline."

    def __init__(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.components = dict(net=torch.nn.Linear(3, 2), tokenizer=object())
        self.scheduler = type('Scheduler', (), dict(config=dict(shift=3.0, _class_name='S')))


def test_a_pipeline_is_known_by_its_weights():
    a = Pipe(0)
    assert pipeline_digest(a) == pipeline_digest(Pipe(0)) != pipeline_digest(Pipe(7))
    before = pipeline_digest(a)
    with torch.no_grad():
        a.components['net'].bias[0] += 1e-3
    assert pipeline_digest(a) != before


def test_sixteen_bits_are_scaled_and_pixels_without_a_range_refused(tmp_path):
    grey = np.full((8, 8), 127, np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / 'deep.png')
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / 'flat.png')
    deep, flat = (FolderImages([tmp_path / f], 8)[0] for f in ('deep.png', 'flat.png'))
    assert torch.equal(deep, flat)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / 'x.tif')
    with pytest.raises(ValueError, match='x.tif has pixels of mode F'):
        FolderImages([tmp_path / 'x.tif'], 8)[0]


def test_an_existing_file_is_never_a_prompt(tmp_path):
    for name in ('prompts.csv', 'prompts'):
        (tmp_path / name).write_text('a cat\n')
        with pytest.raises(ValueError, match='unknown ending'):
            read_prompts(tmp_path / name)
    (tmp_path / 'P.TXT').write_text('a cat\n')
    assert read_prompts(tmp_path / 'P.TXT') == [dict(prompt='a cat')]
    assert len(read_prompts('long ' * 2000)) == 1


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert reports_root('~/x') == tmp_path / 'x'
    write_json('~/y/z.json', {})
    assert (tmp_path / 'y/z.json').exists() and not Path('~').exists()


def test_old_layouts_load_and_damaged_files_are_one_line(tmp_path):
    weights = dict(a=torch.arange(3.0))
    torch.save(weights, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / 'old.pt')['a'], weights['a'])
    for name in ('bad.pt', 'bad.safetensors', 'empty.pt'):
        (tmp_path / name).write_bytes(b'' if name == 'empty.pt' else b'no weights')
        with pytest.raises(ValueError, match='cannot be read as weights') as error:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(error.value)


WAIT = """
import datetime, neuralsolver.shards as s
s.MEETING = datetime.timedelta(seconds=3)
s.workers('cpu')
"""


def test_who_waits_says_for_whom_and_gives_up():
    env = os.environ | dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')
    env['MASTER_PORT'] = str(20000 + os.getpid() % 20000)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-c', WAIT], env=env, capture_output=True, text=True, timeout=400
    )
    assert 'waiting for 2 processes (WORLD_SIZE), this is 0 (RANK)' in done.stderr
    assert 'TimeoutError' in done.stderr and 'did not meet in 3 s' in done.stderr
    assert done.returncode and time.monotonic() - began < 300
