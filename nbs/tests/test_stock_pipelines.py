"The loops of stock pipelines with their own scheduler and with ours."

import csv
import logging
import re

import diffusers
import pytest
import stock_pipelines as stock

from neuralsolver.utils import repository_root

pytestmark = pytest.mark.filterwarnings('ignore')
SOME = (  # one of every kind that was mended
    'AllegroPipeline',
    'CogView3PlusPipeline',
    'CogView4Pipeline',
    'FluxPipeline',
    'KandinskyV22CombinedPipeline',
    'LTXPipeline',
    'MochiPipeline',
    'SanaPipeline',
    'StableAudioPipeline',
    'StableDiffusionPipeline',
    'StableDiffusion3Pipeline',
    'DiTPipeline',
    'PixArtSigmaPipeline',
    'WanPipeline',
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    diffusers.utils.logging.set_verbosity_error()
    caplog.set_level(logging.ERROR, 'neuralsolver')


@pytest.mark.parametrize('name', SOME)
def test_stock_pipeline_runs_with_ours(name):
    row = stock.try_pipeline(getattr(diffusers, name))
    assert row['own'] == row['ours'] == 'runs', row


def committed():
    file = repository_root() / 'reports/stock_pipelines.csv'
    return {row['pipeline']: row for row in csv.DictReader(file.open())}


def test_table_of_the_sweep_says_why_a_pipeline_does_not_run():
    rows = committed()
    running = [r for r in rows.values() if r['own'] == 'runs']
    ours = [r for r in running if r['ours'] == 'runs']
    assert len(running) >= 200 and len(ours) >= 0.95 * len(running)
    assert set(SOME) <= rows.keys()
    for row in running:
        if row not in ours:
            assert re.match('ValueError: the pipeline of this config .* own scheduler', row['ours'])


@pytest.mark.slow
def test_every_stock_pipeline_that_runs_here_runs_with_ours():
    "Writes reports/stock_pipelines.csv."
    rows = stock.sweep(repository_root() / 'reports/stock_pipelines.csv')
    running = [r for r in rows if r['own'] == 'runs']
    ours = [r for r in running if r['ours'] == 'runs']
    assert len(running) >= 200 and len(ours) >= 0.95 * len(running)
