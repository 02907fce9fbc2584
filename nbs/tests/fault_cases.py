"""Inputs that once went wrong, by kind: `python nbs/tests/fault_cases.py` counts what comes back.

A line is WANT code. WANT: E, one clear line; R, a true value; B, one of both.
"""

import collections
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

import neuralsolver as ns
from neuralsolver.utils import write_json

CASES = {
    'sizes': """
E ns.euler(20000)
E ns.euler(10**6)
E ns.adam4(1001)
E ns.rk4(300)
E ns.heun(10**12)
E ns.get_solver('euler', 10**6)
E ns.get_solver('unipc-2', 10**6, ns.VPPath())
E ns.dpm_solver_pp(5000)
E ns.unipc(10**9)
E ns.dpm_solver(3000, 3)
E ns.time_grid(10**12)
E ns.time_grid(10**5)
R len(ns.time_grid(10_000)) == 10_001
R ns.euler(1000).nfe == 1000
E ns.uniform_grid(10**12)
E ns.optimized_nodes(400)
E ns.optimized_nodes(10**9)
E ns.NeuralSolver(10**6)
E ns.neural_solver(torch.ones(2000) / 2000, torch.zeros(2000, 2000))
E ns.Solver(torch.linspace(0, 1, 2001), torch.eye(2000) / 2000)
E ns.DDPMPath(train_steps=10**9)
E ns.DDPMPath('linear', 1e-4, 0.02, 10**12)
E ns.teacher_trajectories(field, noise, steps=10**9)
E ns.search(field, noise, 8, teacher=10**9)
E ns.search(field, noise, 10**9, teacher=10**9)
E indexed_noise(range(10**9), (1, 28, 28))
E indexed_noise(range(10**12), (2,))
E indexed_noise([0], (10**6, 10**6))
E Protocol('sit-tiny', steps=10**9)
E Protocol('sit-tiny', steps=10**6)
E Protocol('sit-tiny', teacher_steps=10**9)
E flow(num_train_timesteps=10**12)
E vp(num_train_timesteps=10**12)
E vp(num_train_timesteps=10**9)
E flow().set_timesteps(10**9)
E vp(solver='unipc-2').set_timesteps(10**9)
E ns.load_solver('/dev/zero.json')
E load(link('zero.json', '/dev/zero'))
""",
    'networks': """
B torch.equal(ns.sample(reuse, z, ns.adam2(8)), ns.sample(fresh, z, ns.adam2(8)))
B torch.equal(ns.sample(ring, z, ns.adam4(9)), ns.sample(fresh, z, ns.adam4(9)))
B torch.equal(ns.sample(view_of_buffer, z, ns.rk4(3)), ns.sample(fresh, z, ns.rk4(3)))
B kept_noise(lambda x, t: x.zero_())
B kept_noise(lambda x, t: x.mul_(2) * 0)
B inference(lambda: kept_noise(lambda x, t: x.zero_()))
B inference(lambda: torch.equal(ns.sample(reuse, z, ns.adam2(8)), ns.sample(fresh, z, ns.adam2(8))))
R inference(lambda: torch.equal(ns.sample(fresh, z, ns.adam2(8)), ns.sample(fresh, z, ns.adam2(8))))
E ns.sample(lambda x, t: x.long(), z, ns.euler(3))
E ns.sample(lambda x, t: x > 0, z, ns.euler(3))
E ns.sample(lambda x, t: x.to(torch.complex64), z, ns.euler(3))
E ns.sample(lambda x, t: (x,), z, ns.euler(3))
E ns.sample(lambda x, t: None, z, ns.euler(3))
E ns.sample(lambda x, t: x.numpy(), z, ns.euler(3))
E ns.sample(lambda x, t: x[:1], z, ns.euler(3))
E ns.sample(lambda x, t: 1.0, z, ns.euler(3))
E ns.sample(lambda x, t: x.to('meta'), z, ns.euler(3))
R ns.sample(lambda x, t: x.half(), z, ns.euler(3)).dtype == torch.float32
R ns.sample(lambda x, t: x.double(), z, ns.euler(3)).dtype == torch.float32
E ns.sample(None, z, ns.euler(3))
E ns.sample(3, z, ns.euler(3))
E ns.sample(field, z.to(torch.float8_e4m3fn), ns.euler(3))
E ns.sample(fresh, z.to_sparse(), ns.euler(3))
E ns.sample(fresh, torch.nested.nested_tensor([z[0], z[1]]), ns.euler(3))
E ns.sample(fresh, z.long(), ns.euler(3))
E ns.sample(fresh, z.numpy(), ns.euler(3))
E ns.sample(fresh, z.tolist(), ns.euler(3))
E ns.sample(fresh, torch.tensor(1.0), ns.euler(3))
E ns.sample(fresh, z / 0, ns.euler(3))
E ns.sample(fresh, z * float('nan'), ns.euler(3))
E ns.sample(fresh, z, 'euler')
E ns.sample(fresh, z, ns.euler(3), cond=[1, 2])
E ns.sample(fresh, z, ns.euler(3), trajectory='yes')
B same_in_training(net)
B same_in_training(dropout)
B torch.equal(dropped(dropout), dropped(dropout))
R net.train() is net and ns.Field(net)(zz, t0, y) is not None and net.training and bool(net.eval())
E ns.sample(ns.Field(net, guidance=2.0), zz, ns.euler(3), torch.tensor([3, 11]))
E ns.sample(ns.Field(net), zz, ns.euler(3), torch.tensor([3, -1]))
E ns.sample(ns.Field(net), zz, ns.euler(3), torch.tensor([3.0, 1.0]))
E ns.sample(ns.Field(net), zz, ns.euler(3), torch.tensor([3]))
E ns.sample(ns.Field(net), zz, ns.euler(3), [3, 1])
E ns.sample(ns.Field(net), zz, ns.euler(3))
E ns.sample(ns.Field(net), zz, ns.euler(3), torch.tensor([3, 10**9]))
R ns.sample(ns.Field(net), zz, ns.euler(3), torch.tensor([3, 10])).isfinite().all()
E ns.sample(ns.Field(net), zz[..., :27], ns.euler(3), y)
E ns.sample(ns.Field(net), zz[:, 0], ns.euler(3), y)
E ns.sample(mixture, noise[:2], ns.euler(3), torch.tensor([0, 9]))
E ns.sample(mixture, noise[:2], ns.euler(3), torch.tensor([0, -2]))
E ns.sample(mixture, noise[:2], ns.euler(3), torch.tensor([0.5, 1.0]))
E ns.sample(mixture, noise[:2, :1], ns.euler(3))
R ns.sample(mixture, noise.half(), ns.euler(3)).dtype == torch.float16
R ns.sample(mixture, noise.bfloat16(), ns.euler(3)).isfinite().all()
R ns.sample(mixture, noise.double(), ns.euler(3)).dtype == torch.float64
""",
    'search': """
B solves(noise.half())
B solves(noise.bfloat16())
E solves(nan_noise)
E solves(inf_noise)
E solves(noise, cond=[0] * 20)
E solves(noise, cond=np.zeros(20))
E solves(noise, cond=torch.zeros(3))
E solves(noise, seed=2**70)
E solves(noise, seed=-1)
E solves(noise, seed=1.5)
E solves(noise, checkpoint='/proc/x.ckpt')
E solves(noise, checkpoint=7)
E solves(noise, checkpoint=True)
E solves(noise, checkpoint=text_file('a.ckpt', 'hello'))
E solves(noise, checkpoint=text_file('b.ckpt', ''))
E solves(noise, checkpoint='.')
E solves(noise, checkpoint='folder/')
E solves(noise, provenance='mine')
E solves(noise, provenance=['mine'])
E solves(noise, provenance={'a': {1}})
E solves(noise, provenance={'a': float('nan')})
E solves(noise, name=None)
E solves(noise, name=7)
E solves(noise, name='a' * 10**6)
B no_grad(lambda: solves(noise))
B inference(lambda: solves(noise))
E solves(noise, path='linear')
E solves(noise, init='euler')
E solves(noise, method='magic')
E solves(noise, heldout=20)
E solves(noise, heldout='5')
E solves(noise, eval_batch_size=0)
E solves(noise, lr='0.1')
E solves(noise, lr=float('nan'))
E solves(noise, speed=3)
E solves(noise, batch_size=10**9)
E solves(noise, teacher='100')
E solves(noise, teacher=None)
E solves(noise, teacher=True)
E solves(noise, teacher=100.0)
E solves(noise.numpy())
E solves(None)
E solves(noise[:1])
E ns.search(None, noise, 3, teacher=6)
E ns.search(field, noise, '3', teacher=6)
E ns.search(field, noise, True, teacher=6)
E ns.neural_solver([1.0, 2.0], torch.zeros(2, 2))
E ns.neural_solver([0.5, float('nan')], torch.zeros(2, 2))
E ns.neural_solver([0.5, 0.5], torch.ones(2, 2))
E ns.neural_solver('ab', torch.zeros(2, 2))
E ns.neural_solver(None, None)
E ns.neural_solver([0.5, 0.5], torch.zeros(2, 2), path='linear')
E ns.neural_solver([0.5, 0.5], torch.zeros(2, 2), t_start=3.0)
E ns.NeuralSolver(2.5)
E ns.NeuralSolver(4, init='euler')
E ns.NeuralSolver(4, order='2')
E ns.teacher_trajectories(field, nan_noise, steps=4)
E ns.teacher_trajectories(field, noise, [0] * 20, steps=4)
E ns.teacher_trajectories(field, noise, steps=4, batch_size=0)
E ns.teacher_trajectories(field, noise, steps=4, folder=7)
E ns.teacher_trajectories(field, noise, steps=4, path='linear')
E ns.teacher_trajectories(field, noise, steps=4, solver='euler')
E ns.fit_rows(field, teacher, [0.0, 0.5])
E ns.fit_rows(field, teacher, 'ab')
E ns.gits(teacher, 10**6)
E ns.gits(teacher, '3')
""",
    'solvers': """
E ns.Solver([0, 0.5, 1], half, steps=1.5)
E ns.Solver([0, 0.5, 1], half, steps=float('nan'))
E ns.Solver([0, 0.5, 1], half, steps=-1)
E ns.Solver([0, 0.5, 1], half, steps='2')
E ns.Solver([0, 0.5, 1], half, path=None)
E ns.Solver([0, 0.5, 1], half, path='linear')
E ns.Solver([0, 0.5, 1], half, path=ns.LinearPath)
E ns.Solver([0, 0.5, 1], half, params=-1)
E ns.Solver([0, 0.5, 1], half, params=1.5)
E ns.Solver([0, 0.5, 1], half, provenance='mine')
E ns.Solver([0, 0.5, 1], half, name=None)
E ns.Solver([0, 0.5, 1], half, name=3)
E ns.Solver([0, 0.5, 1], half, coordinates='x')
E ns.Solver([0, 0.5, 1], half, coordinates=None)
E ns.Solver([0, 0.5, 1], half, coordinates=['velocity'])
E ns.Solver([-1, 0, 3], torch.diag(torch.tensor([1.0, 3.0])))
E ns.Solver([0, 0.5, float('nan')], half)
E ns.Solver(['a', 'b', 'c'], half)
E ns.Solver(None, half)
E ns.Solver([0, 0.5, 1], None)
E ns.Solver([0, 0.5, 1], 'ab')
E ns.Solver([0, 0.5, 1], half.to(torch.complex64))
E ns.Solver([0, 0.5, 1], half, gains=[1.0, float('inf')])
E ns.Solver([0, 0.5, 1], half, gains='ab')
E ns.euler(2, [0, 1, 2])
E ns.euler(3, [0, 0.5, 1, 2])
E ns.euler(3, [-1, 0, 0.5, 1])
E ns.heun(2, [0.5, 1, 2])
E ns.adam4(3, [-1, 0, 0.5, 1])
E ns.midpoint(2, [0, 1, 2])
E ns.rk4(2, [-2, 0, 1])
E ns.euler(2, 'abc')
E ns.euler(2, 5)
E ns.euler(2, [[0, 1, 2]])
E ns.euler(2, [0, 0.5, None])
E ns.euler(2, [0, float('nan'), 1])
E ns.euler(0)
E ns.euler(-3)
E ns.euler(2.0)
E ns.euler('3')
E ns.euler(None)
E ns.euler(True)
E ns.adams_bashforth(4, 5)
E ns.adams_bashforth(4, '2')
E ns.adams_bashforth(4, 2, start=['rk4'])
E ns.VPPath('a')
E ns.VPPath(nan)
E ns.VPPath(0.1, inf)
E ns.VPPath(0.1, 20.0, -1.0)
E ns.VPPath(0.1, 20.0, 1.0)
E ns.VPPath(-0.1)
E ns.VPPath(20.0, 0.1)
E ns.VPPath(None)
E ns.VPPath(0.1, 1e9)
E ns.DDPMPath('x')
E ns.DDPMPath(['linear'])
E ns.DDPMPath(beta_start='a')
E ns.DDPMPath(beta_end=None)
E ns.DDPMPath(train_steps=1)
E ns.ShiftedPath(nan)
E ns.ShiftedPath(0)
E ns.ShiftedPath('3')
E ns.ShiftedPath(1e30)
E ns.time_grid(4, 'vp')
E ns.time_grid(4, None)
E ns.time_grid(4, ns.VPPath(), 'spiral')
E ns.time_grid(4, ns.VPPath(), [0, 1])
E ns.time_grid(4, ns.VPPath(), 'ab')
E ns.time_grid(2, ns.VPPath(), ['a', 'b', 'c'])
E ns.time_grid(2, ns.VPPath(), 5)
E ns.time_grid(2, ns.VPPath(), {'a': 1})
E ns.time_grid(4, ns.VPPath(), t_start=7)
E ns.time_grid(4, ns.VPPath(), t_end='x')
E ns.time_grid(4, ns.VPPath(), 'karras', rho=nan)
E ns.time_grid(4, ns.LinearPath(), 'karras')
E ns.optimized_nodes(4, 'vp')
E ns.optimized_nodes(4, ns.VPPath(), ['time'])
E ns.ddim(4, 'vp')
E ns.ddim(4, None)
E ns.deis(4, 5)
E ns.ipndm(4, 0)
E ns.unipc(4, variant='x')
E ns.dpm_solver_pp(4, path=3)
E ns.change_path(None, ns.VPPath())
E ns.change_path(ns.euler(3), 'vp')
E ns.change_path('euler', ns.VPPath())
E ns.get_solver('euler@', 4)
E ns.get_solver('nothing', 4)
E ns.get_solver(None, 4)
E ns.get_solver('', 4)
E ns.get_solver('euler', 4, 'vp')
E ns.get_solver('euler@spiral', 4)
E ns.get_solver('sit-xl-2', 100)
E ns.load_solver('nothing', 4)
E ns.load_solver(None, 4)
E ns.load_solver(7, 4)
E ns.load_solver(['sit-xl-2'], 4)
E ns.load_solver('sit-xl-2', '8')
E ns.load_solver('sit-xl-2', [8])
E ns.load_solver('sit-xl-2')
E ns.load_solver('missing.json')
E ns.load_solver('.', 4)
E ns.load_solver('folder.json')
R ns.load_solver('sit-xl-2', 8).nfe == 8
""",
    'fields': """
E ns.Field(net, path='linear')
E ns.Field(None)
E ns.Field(3)
E ns.Field(net, prediction='x')
E ns.Field(net, guidance=nan)
E ns.Field(net, guidance=1e30)
E ns.Field(net, guidance='2')
E ns.Field(net, guidance=-1)
E ns.Field(net, guidance=None)
E ns.Field(net, guided_channels=0)
E ns.Field(net, null_label='a')
E ns.Field(net, null_label=-1)
E ns.Field(net, guidance=2.0, null_label=1.5)
E ns.Field(net, network_time=['t'])
E ns.GuidanceRange(net, guidance=2.0)
E ns.GuidanceRange(lambda x, t, y: x)
E ns.GuidanceRange.conditions([0, 1])
E ns.GuidanceRange.conditions(y, 0.0, 4.0)
E ns.GuidanceRange.conditions(y, 4.0, 1.0)
E ns.sample(ns.GuidanceRange(net), zz, ns.euler(3), y)
E ns.sample(ns.GuidanceRange(net), zz, ns.euler(3), torch.tensor([[3.0, nan], [1.0, 1.0]]))
E ns.sample(ns.GuidanceRange(net), zz, ns.euler(3), torch.tensor([[3.5, 1.0], [1.0, 1.0]]))
E ns.sample(ns.GuidanceRange(net), zz, ns.euler(3), torch.tensor([[99.0, 1.0], [1.0, 1.0]]))
R ns.sample(ns.GuidanceRange(net), zz, ns.euler(3), ns.GuidanceRange.conditions(y)).isfinite().all()
E mix(labels=torch.tensor([0.0, 1.0]))
E mix(labels=torch.tensor([-1, 0]))
E mix(labels=torch.tensor([0]))
E mix(labels=[0, 1])
E mix(weights=torch.tensor([0.0, 0.0]))
E mix(weights=torch.tensor([-1.0, 2.0]))
E mix(weights=torch.tensor([nan, 2.0]))
E mix(weights=[1, 2])
E mix(weights=torch.tensor([1.0]))
E mix(path=None)
E mix(path='linear')
E mix(std=nan)
E mix(std='a')
E mix(prediction='x')
E ns.GaussianMixture(torch.tensor([[nan, 1.0]]), 0.1)
E ns.GaussianMixture(torch.tensor([[1, 2]]), 0.1)
E ns.GaussianMixture([[1.0, 2.0]], 0.1)
E ns.GaussianMixture(torch.zeros(0, 2), 0.1)
E ns.GaussianMixture(None, 0.1)
E ns.guide(z, z, nan)
E ns.guide(z, z[:1], 2.0)
E ns.guide(z, z, '2')
E ns.guide(z, z, torch.ones(len(z) + 1))
""",
    'solver files': """
E load(changed(nfe=3))
E load(changed(steps=10**400))
E load(changed(steps=0))
E load(changed(steps='8'))
E load(changed(path=dict(name='vp', beta_min=nan)))
E load(changed(path=dict(name='ddpm', train_steps=10**9)))
E load(changed(path=dict(name='nowhere')))
E load(changed(path=dict(name=['linear'])))
E load(changed(path={}))
E load(changed(path=None))
E load(changed(params=-1))
E load(changed(name=5))
E load(changed(name=None))
E load(changed(coordinates='x'))
E load(changed(coordinates=['velocity']))
E load(changed(nodes=None))
E load(changed(nodes='ab'))
E load(changed(nodes=[0, 1]))
E load(changed(nodes=[[0.0]] * 9))
E load(changed(weights=None))
E load(changed(weights=5))
E load(changed(weights=[5] * 8))
E load(changed(weights=['ab'] * 8))
E load(changed(weights=[[1.0]] * 8))
E load(changed(weights=[[1e12, -1e12 + 1.0]] + [[1.0]]))
E load(changed(weights={}))
E load(huge_weights())
E load(changed(gains=[nan] * 8))
E load(changed(gains='x'))
E load(changed(provenance=[]))
E load(json_file('list.json', '[]'))
E load(json_file('null.json', 'null'))
E load(json_file('empty.json', ''))
E load(json_file('text.json', 'hello'))
E load(json_file('nan.json', 'NaN'))
E load(json_file('deep.json', '[' * 10**5))
E load(json_file('big.json', '{"a": "' + 'x' * (17 * 2**20) + '"}'))
E load(bytes_file('bytes.json', bytes(range(256))))
E load(bytes_file('utf16.json', '{}'.encode('utf-16')))
E ns.Solver.from_dict([])
E ns.Solver.from_dict(None)
E ns.Solver.from_dict('solver')
E ns.save_solver(ns.euler(3), 7)
E ns.save_solver(ns.euler(3), None)
E ns.save_solver(ns.euler(3), '')
E ns.save_solver('euler', 'a.json')
E ns.save_solver(ns.euler(3), '/proc/a.json')
R ns.save_solver(ns.euler(3), 'e.json') is None and load('e.json').digest == ns.euler(3).digest
""",
    'paths': """
R expands(lambda: results_root('~/r'))
R expands(lambda: reports_root('~/r'))
R expands(lambda: write_json('~/r/a.json', {}))
R write_text('~/r/a.txt', 'x').is_file()
R expands(lambda: ns.save_solver(ns.euler(3), '~/r/s.json'))
R expands(lambda: solves(noise, checkpoint='~/r/s.ckpt'))
R expands(lambda: ns.teacher_trajectories(field, noise, steps=4, folder='~/r/t', progress=False))
R expands(lambda: save_home_solver()) and load('~/r/s.json').nfe == 3
R expands(lambda: save_weights(torch.nn.Linear(2, 2).state_dict(), {}, '~/r/w.safetensors'))
R expands(lambda: Store('~/r/x.json', {}, 'thing').write({'a': 1}))
R expands(lambda: Shards('~/r/sh', {}, [(0, 1)]).write(0, 1, dict(a=torch.zeros(1))))
R expands(lambda: write_records('~/r/rec.jsonl', {}))
E reports_root(7)
E reports_root(True)
E reports_root(3.5)
E reports_root(['a'])
E results_root(2026)
E results_root(chr(0))
E write_text(None, 'x')
E write_json(True, {})
E Store(7, {}, 'thing')
E Store(None, {}, 'thing')
E Shards(7, {}, [(0, 1)])
E read_prompts(7)
E read_prompts(None)
E read_reference(7, None)
E check_reference(None)
E read_idx(None)
E load_model(7)
E load_model(None)
E load_model(['sit-tiny'])
E load_model('sit-tiny', 'nowhere')
E load_model('sit-tiny', path=7)
E load_model('sit-xl-2-256', path=7)
E load_model('sit-xl-2-256', path=text_file('w.pt', 'no weights'))
E load_model('sit-xl-2-256', path=text_file('w2.pt', ''))
E load_model('sit-xl-2-256', path='.')
E read_checkpoint(text_file('w.safetensors', 'x'))
E read_checkpoint(7)
E asset_file('x', None, 'https://nowhere', path=7)
E sha256('nothing')
E sha256(7)
E fashion_mnist('train', root=7)
E fashion_mnist(['train'])
E geneval_scores(7)
E geneval_scores(text_file('r.jsonl', '{"tag": "a", "correct": null}'))
E geneval_scores(text_file('r2.jsonl', '{"tag": "a", "correct": "yes"}'))
E geneval_scores(text_file('r3.jsonl', 'x'))
E geneval_scores('missing.jsonl')
""",
    'links': """
E ns.teacher_trajectories(field, noise, steps=4, folder=link('t', outside), progress=False)
E linked_states(dangling=False)
E linked_states(dangling=True)
E linked_lock('teacher/.lock')
R replaces_link('card.json')
E reproduce_with_linked_lock()
R not_through_log_link()
""",
    'names': """
E check_name('run', '../../x')
E check_name('run', '/x')
E check_name('run', 'a/b')
E check_name('run', 'a' + chr(92) + 'b')
E check_name('run', '..')
E check_name('run', '.')
E check_name('run', '')
E check_name('run', None)
E check_name('run', 'a' * 300)
E check_name('run', 'a' + chr(0))
E check_name('run', 'a' + chr(10))
R check_name('run', 3) == '3'
R check_name('run', 'a b-1.2+c@d') == 'a b-1.2+c@d'
E SearchPlan(label='../x')
E SearchPlan(label='..')
E split_names('a', None)
E split_names('a', [])
E split_names('a', {})
E split_names('a', True)
E split_names('a', object())
R split_names('a', 3) == ['3']
E split_numbers('a', None)
E split_numbers('a', 'nan', float)
E split_numbers('a', '1,1')
E split_numbers('seeds', '01,1')
E Protocol('sit-tiny', seeds='01,1')
E Protocol('sit-tiny', seeds='1,1')
E Protocol('sit-tiny', seeds='²')
R Protocol('sit-tiny', seeds=5).seeds == '5'
E Protocol('sit-tiny', steps=1.5)
E Protocol('sit-tiny', guidance=1e30)
E Protocol('sit-tiny', guidance='x')
E Protocol('../../x')
E Protocol('sit-tiny', solvers='')
E Protocol('sit-tiny', solvers=7)
E Protocol('sit-tiny', images='a/b')
E Protocol('sit-tiny', device='')
E Protocol('sit-tiny', device=7)
E indexed_noise([1.5], (2,))
E indexed_noise([-1], (2,))
E indexed_noise(3, (2,))
E indexed_noise([0], 2)
E indexed_noise([0], (2.5,))
E indexed_noise([0], (2,), seed=-1)
E indexed_noise([0], (2,), seed=1.5)
E indexed_noise([0], (2,), dtype=torch.float16)
E shard_ranges(0, 2, 2)
E shard_ranges(-1, 2, 2)
E read_prompts(text_file('list.csv', 'a;b'))
E read_prompts(text_file('NOENDING', 'a;b'))
E read_prompts('../../x')
E read_prompts('/some/where')
E read_prompts('missing.csv')
E read_prompts('~/x')
R len(read_prompts('a cat on a mat, ' * 60)) == 1
R len(read_prompts('a cat\\non a mat; a dog')) == 2
R [p['prompt'] for p in read_prompts('a cat; 3/4 of a dog')] == ['a cat', '3/4 of a dog']
E read_prompts(text_file('P.TXT', ' '))
R read_prompts(text_file('Q.TXT', 'a cat'))[0]['prompt'] == 'a cat'
E typed('steps', 'x', int)
E typed('steps', 10**9, int)
E typed('samples', 10**12, int)
E typed('threads', 10**9, int)
E typed('batch_size', 10**9, int)
E typed('guidance', 1e30, float)
E typed('guidance', float('nan'), float)
E typed('guidance', [1], float)
E typed('run', ['a'], str)
R typed('run', 20241127, str) == '20241127'
R typed('reports_dir', 2026, str) == '2026'
R typed('seed', 20241127, int) == 20241127
R typed('download', 'False', bool) is False
E typed('download', 'perhaps', bool)
R typed('download', 1, bool) is True
R typed('reports_dir', '~/x', str) == str(Path.home() / 'x')
""",
    'numbers': """
E frechet_distance((m, s), (m, s + skew))
E frechet_distance((m, s), (m, -s))
E frechet_distance((m * nan, s), (m, s))
E frechet_distance((m, s), (m[:2], s))
R abs(frechet_distance((m, s), (m, s))) < 1e-9
E inception_score(torch.full((10, 3), nan))
E inception_score(torch.zeros(0, 3))
E inception_score(torch.zeros(10))
E precision_recall(torch.full((10, 3), nan), torch.zeros(10, 3))
E precision_recall(torch.zeros(10, 3), torch.zeros(10, 4))
E kernel_distance(torch.full((10, 3), nan), torch.zeros(10, 3))
E moments(torch.full((10, 3), nan))
E moments(torch.zeros(10))
E end_errors(torch.zeros(2, 3), torch.zeros(2, 1))
E check_int('a', 10**400, 1, 10)
E check_int('a', True)
E check_int('a', None)
E check_float('a', 10**400)
E check_float('a', True)
E check_float('a', '1')
E check_choice('a', [1], {'b': 1})
E check_choice('a', {}, ('b',))
E read_moments(mu=np.zeros(2048, np.complex64))
E read_moments(sigma=np.triu(np.ones((2048, 2048))))
E read_moments(sigma=-np.eye(2048))
E read_moments(mu=np.full(2048, nan))
""",
    'kept results': """
R damaged_checkpoints() == 0
R damaged_shards() == 0
E teacher_card('[]')
E teacher_card('{}')
E teacher_card('')
E teacher_card('{"identity": []}')
E teacher_card('{"identity": {}, "done": -1}')
E edited_card(done=-5)
E edited_card(done='many')
E edited_card(seconds=None)
E edited_card(ends_sha256='0')
R waits_for_whom()
E edited_search(iteration=-5)
E edited_search(iteration='3')
E edited_search(module=dict(r=torch.full((3,), nan), c=torch.zeros(3)))
E interpolated_nodes('nothing', 4, ns.LinearPath())
E data_file(7)
E data_file('nothing')
E load_pipeline(['x'])
E load_pipeline('no-such-pipeline')
E load_pipeline('sit-tiny', 'nowhere')
E load_pipeline('sit-tiny', dtype=[1])
E record_without_solver()
E typed('processes', 0, int)
E typed('jobs', -1, int)
""",
    'pages': """
R '<script' not in html_page('a<script>alert(1)</script>')
R '<script' not in markdown(pd.DataFrame({'<script>': ['<script>alert(1)</script>']}))
R '<script' not in markdown_page('a<script>alert(1)</script>')
""",
    'schedulers': """
E flow(solver=[])
E flow(solver=None)
E flow(solver=7)
E flow(solver={})
E flow(solver={'weights': 5})
E flow(solver='nothing')
E flow(solver='../x.json')
E flow(solver=[['sit-xl-2']])
E flow(num_train_timesteps=0)
E flow(num_train_timesteps='1000')
E flow(num_train_timesteps=nan)
E flow(shift=nan)
E flow(shift='3')
E flow(compose_shift='yes')
E flow(compose_shift=[1])
E flow(mean_trick='x')
E flow(mean_trick=['shrunk'])
E flow(prediction_type='x')
E vp(beta_start=nan)
E vp(beta_end=2.0)
E vp(beta_schedule='x')
E vp(beta_schedule=['linear'])
E vp(trained_betas=[nan] * 10)
E vp(trained_betas='ab')
E vp(trained_betas=[2.0] * 10)
E vp(prediction_type=None)
E vp(snr_shift_scale=0)
E type(flow()).from_config('x')
E type(flow()).from_config(None)
E type(flow()).from_config([])
E type(flow()).from_config(7)
E flow().set_timesteps(None)
E flow().set_timesteps('8')
E flow().set_timesteps(8.0)
E flow().set_timesteps(True)
E flow().set_timesteps(0)
E flow().set_timesteps(99)
E flow().set_timesteps(sigmas=[nan, 0.5])
E flow(solver='ab2').set_timesteps(2, sigmas=[nan, 0.5])
E flow().set_timesteps(sigmas='ab')
E flow().set_timesteps(sigmas=[])
E flow().set_timesteps(sigmas=[0.1, 0.5])
E flow().set_timesteps(timesteps=['a'])
E flow().set_timesteps(8, strength=nan)
E flow().set_timesteps(8, strength='x')
E flow().set_timesteps(8, mu='x')
E step(flow(), zz.to(torch.complex64))
E step(vp(), zz.to(torch.complex64))
E step(flow(), zz.long())
E step(vp(), zz.long())
E step(vp(), zz > 0)
E step(vp(), None)
E step(vp(), zz[:1])
E step(vp(), zz, t=nan)
E step(flow(), zz, t=nan)
E step(flow(), zz, t='x')
E step(flow(), zz, t=None)
E step(flow(), zz, x=None)
E step(flow(), zz, x=zz.long())
E flow().step(zz, 1.0, zz)
R step(flow(), zz).prev_sample.isfinite().all()
R step(vp(), zz.half(), x=zz.half()).prev_sample.dtype == torch.float16
""",
}


class Tools:
    "What the lines call."

    def __init__(self, folder: Path):
        self.folder, self.home = folder / 'work', folder / 'home'
        self.outside = folder / 'outside'
        for f in (self.folder, self.home, self.outside):
            f.mkdir()
        (self.folder / 'folder.json').mkdir()
        self.z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        self.zz = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        self.y, self.t0 = torch.tensor([3, 1]), torch.tensor(0.5)
        self.mixture = ns.GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), 0.3)
        self.field = self.mixture
        self.noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(2))
        self.nan_noise = self.noise.clone()
        self.nan_noise[3, 0] = float('nan')
        self.inf_noise = self.noise.clone()
        self.inf_noise[3, 0] = float('inf')
        self.half = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
        self.nan, self.inf = float('nan'), float('inf')
        self.m, self.s = torch.zeros(3).double(), torch.eye(3).double()
        self.skew = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]]).double()
        self.dropout = Dropping()
        self.count = 0

    @property
    def net(self):
        return ns.load_model('sit-tiny')

    @property
    def teacher(self):
        return ns.teacher_trajectories(self.field, self.noise, steps=6, progress=False)

    def fresh(self, x, t):
        return x * -(1 + t)

    def reuse(self, x, t):
        if getattr(self, 'buffer', None) is None or self.buffer.shape != x.shape:
            self.buffer = torch.empty_like(x)
        return torch.mul(x, -(1 + t), out=self.buffer)

    def ring(self, x, t):
        self.count += 1
        if not hasattr(self, 'buffers'):
            self.buffers = [torch.empty_like(x) for _ in range(3)]
        return torch.mul(x, -(1 + t), out=self.buffers[self.count % 3])

    def view_of_buffer(self, x, t):
        return self.reuse(x, t).view(-1).view_as(x)

    def kept_noise(self, field):
        before = self.z.clone()
        x = self.z.clone()
        result = ns.sample(field, x, ns.adam2(4))
        right = ns.sample(lambda x, t: field(x.clone(), t), before, ns.adam2(4))
        return torch.equal(x, before) and torch.equal(result, right)

    def inference(self, call):
        with torch.inference_mode():
            return call()

    def no_grad(self, call):
        with torch.no_grad():
            return call()

    def same_in_training(self, net):
        noise = self.zz if net is not self.dropout else self.z
        shown = ns.sample(ns.Field(net.eval()), noise, ns.euler(3), self.y[: len(noise)])
        try:
            return torch.equal(ns.sample(ns.Field(net.train()), noise, ns.euler(3), self.y), shown)
        finally:
            net.eval()

    def dropped(self, net):
        try:
            return ns.sample(net.train(), self.z, ns.euler(3))
        finally:
            net.eval()

    def solves(self, noise, **options):
        given = dict(method='paper', iterations=2, batch_size=4, eval_every=1, progress=False)
        if 'teacher' not in options:
            given['teacher'] = 6
        found = ns.search(self.field, noise, 3, **given | options)
        return torch.isfinite(torch.tensor(found.history['heldout_rmse'])).all()

    def mix(self, **options):
        return ns.GaussianMixture(
            torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), **dict(std=0.3) | options
        )

    def load(self, file):
        return ns.load_solver(file)

    def changed(self, **entries):
        return self.json_file('changed.json', json_text(ns.euler(8).to_dict() | entries))

    def huge_weights(self):
        d = ns.euler(8).to_dict()
        d['weights'][1] = [1e12, 0.125 - 1e12]
        return self.json_file('huge.json', json_text(d))

    def json_file(self, name, text):
        return self.text_file(name, text)

    def text_file(self, name, text):
        return self.bytes_file(name, text.encode())

    def bytes_file(self, name, content):
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def link(self, name, target):
        place = self.folder / name
        if place.is_symlink():
            place.unlink()
        place.symlink_to(target)
        return str(place)

    def expands(self, call):
        call()
        return (self.home / 'r').is_dir() and not (self.folder / '~').exists()

    def save_home_solver(self):
        ns.save_solver(ns.euler(3), '~/r/s.json')

    def save_weights(self, state, card, path):
        from neuralsolver.checkpoints import save_model

        net = torch.nn.Linear(2, 2)
        net.config = {}
        save_model(net, state, path, card)

    def _teacher(self, folder):
        return ns.teacher_trajectories(
            self.field, self.noise, steps=4, folder=folder, progress=False
        )

    def linked_states(self, dangling):
        "The file of the states is a link, and there is more to be written."
        from neuralsolver.store import Store

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        target = self.outside / 'states.npy'
        if not dangling:
            np.save(target, np.zeros((20, 5, 2), np.float32))
        before = target.read_bytes() if target.exists() else None
        (folder / 'states.npy').symlink_to(target)
        try:
            store = Store(folder / 'card.json', {}, 'teacher')
            store.array('states.npy', (20, 5, 2), np.float32, 'w+' if dangling else 'r+')
            return self._teacher(folder)
        finally:
            assert (target.read_bytes() if target.exists() else None) == before
            target.unlink(missing_ok=True)

    def linked_lock(self, name):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / 'teacher').mkdir()
        (self.outside / 'precious').write_text('x')
        (folder / name).symlink_to(self.outside / 'precious')
        try:
            self._teacher(folder / 'teacher')
        finally:
            assert (self.outside / 'precious').read_text() == 'x'
            (self.outside / 'precious').unlink()

    def replaces_link(self, name):
        (self.outside / 'card.json').write_text('mine')
        self.link(name, self.outside / 'card.json')
        with contextlib.suppress(ValueError):
            write_json(self.folder / name, {})
        kept = (self.outside / 'card.json').read_text() == 'mine'
        (self.outside / 'card.json').unlink()
        (self.folder / name).unlink(missing_ok=True)
        return kept

    def reproduce_with_linked_lock(self):
        from neuralsolver.tools.reproduce import reproduce

        reports = Path(tempfile.mkdtemp(dir=self.folder))
        (reports / 'runs').mkdir()
        (self.outside / 'precious').write_text('x')
        (reports / 'runs/.lock').symlink_to(self.outside / 'precious')
        try:
            reproduce({}, reports, progress=False)
        finally:
            assert (self.outside / 'precious').read_text() == 'x'
            (self.outside / 'precious').unlink()

    def not_through_log_link(self):
        from neuralsolver.tools import reproduce
        from neuralsolver.tools.manifest import Run

        reports = Path(tempfile.mkdtemp(dir=self.folder))
        (reports / 'runs').mkdir()
        run = Run('nothing-at-all', (), (), (), 1)
        log = reproduce._stamp(run, reports).with_suffix('.log')
        log.symlink_to(self.outside / 'log')
        real, reproduce.sys.executable = sys.executable, '/bin/true'  # nothing is to be run
        try:
            reproduce._start(run, reports, 1).wait()
        finally:
            reproduce.sys.executable = real
        return not (self.outside / 'log').exists()

    def _checkpoint(self):
        file = self.folder / 'search.ckpt'
        if not file.exists():
            self.solves(self.noise, checkpoint=file)
        return file.read_bytes()

    def edited_search(self, **entries):
        "A checkpoint with a right checksum and numbers that cannot be."
        from neuralsolver.store import Store, _read

        self._checkpoint()
        identity, state = _read(self.folder / 'search.ckpt')
        Store(self.folder / 'edited.ckpt', identity, 'search').write(state | entries)
        return self.search_digest(self.folder / 'edited.ckpt')

    def record_without_solver(self):
        from neuralsolver.tools import search_runs

        plan = search_runs.SearchPlan(samples=8, heldout=2, settings=dict(batch_size=4))
        record = dict(identity=plan.identity)
        write_json(self.folder / f'{plan.name}.json', record)
        return search_runs.run_search(plan, self.folder)

    def damaged_checkpoints(self):
        content = self._checkpoint()
        right = self.search_digest(self.folder / 'right.ckpt')
        wrong = 0
        for place in range(3, len(content), len(content) // 20):
            file = self.folder / 'bits.ckpt'
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                wrong += self.search_digest(file) != right
            except Exception as e:
                wrong += verdict(e) != 'clear line'
        return wrong

    def search_digest(self, file):
        given = dict(method='paper', iterations=2, batch_size=4, eval_every=1, progress=False)
        return ns.search(
            self.field, self.noise, 3, teacher=6, checkpoint=file, **given
        ).solver.digest

    def damaged_shards(self):
        from neuralsolver.shards import Shards

        shards = Shards(self.folder / 'shards', {'a': 1}, [(0, 5)])
        shards.write(0, 5, dict(x=torch.arange(5.0)))
        content, wrong = shards.file(0, 5).read_bytes(), 0
        for place in range(len(content)):
            changed = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
            shards.file(0, 5).write_bytes(changed)
            try:
                wrong += shards.done(0, 5) and not torch.equal(
                    shards.rows('x')[:], torch.arange(5.0)
                )
            except Exception as e:
                wrong += verdict(e) != 'clear line'
        return wrong

    def teacher_card(self, text):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._teacher(folder)
        (folder / 'card.json').write_text(text)
        return self._teacher(folder)

    def edited_card(self, **entries):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._teacher(folder)
        card = json.loads((folder / 'card.json').read_text())
        (folder / 'card.json').write_text(json.dumps(card | entries))
        return self._teacher(folder)

    def waits_for_whom(self):
        from neuralsolver import store

        one = store.Store(self.folder / 'busy.json', {}, 'search')
        said = io.StringIO()
        with one.lock():
            store.PATIENCE, patience = 0.2, store.PATIENCE
            try:
                with contextlib.redirect_stderr(said), one.lock():
                    return False
            except (TimeoutError, ValueError) as e:
                return str(os.getpid()) in said.getvalue() + str(e)
            finally:
                store.PATIENCE = patience

    def html_page(self, text):
        from neuralsolver.tools.cards import CARD, JINJA

        JINJA.filters |= dict(outcome=str)
        shown = dict.fromkeys(('title', 'item', 'status', 'shows', 'why', 'verdict', 'slug'), text)
        shown |= dict(run=None, outcome={}, tables=[], pictures=[], links=[text], gone=[text])
        page = '{% for i in items %}{{ card(i) }}{% endfor %}'
        try:
            return JINJA.from_string(CARD + page).render(items=[shown], profile='embedded')
        except Exception as e:
            return f'<script {e}'

    def markdown_page(self, text):
        from neuralsolver.tools import results_page

        shown = dict.fromkeys(('title', 'shows', 'why', 'verdict'), text) | dict(item='a')
        run = dict(command='papermill', minutes=1)
        shown |= dict(status='regenerated', run=run, known={}, outcome=dict(failed=text), tables=[])
        page = results_page.JINJA.overlay(autoescape=False)
        page.filters |= dict(outcome=results_page._outcome, as_markdown=str)
        page.filters |= dict(text=results_page.as_text)
        given = dict(items=[shown], counts=[], profile='embedded', source='')
        return page.from_string(results_page.MARKDOWN).render(given)

    def typed(self, name, value, kind):
        from neuralsolver.tools.papermill_engine import _Parameter, typed

        return typed(name, value, _Parameter(kind.__name__, False))

    def read_moments(self, **arrays):
        from neuralsolver import inception

        file = self.folder / 'moments.npz'
        np.savez(file, **dict(mu=np.zeros(2048), sigma=np.eye(2048)) | arrays)
        known, _ = inception._read_arrays(file)
        inception._check_moments(file, known)

    def flow(self, **options):
        from neuralsolver.diffusers import FlowNeuralSolverScheduler

        return FlowNeuralSolverScheduler(**options)

    def vp(self, **options):
        from neuralsolver.diffusers import VPNeuralSolverScheduler

        return VPNeuralSolverScheduler(**options)

    def step(self, scheduler, output, x=0, t=0):
        scheduler.set_timesteps(8)
        x = self.zz if isinstance(x, int) else x
        t = scheduler.timesteps[0] if isinstance(t, int) else t
        return scheduler.step(output, t, x)


class Dropping(torch.nn.Module):
    "A small network with dropout."

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, t, y=None):
        return self.drop(x)


def json_text(content) -> str:
    return json.dumps(content)


MODULES = (
    'assets checkpoints data inception metrics neural pipelines protocol shards store '
    'tables text_to_image tools.search_runs tools.papermill_engine utils'
).split()


def names_of(tools: Tools) -> dict:
    "The names that a line can use."
    found = {}
    for module in MODULES:
        public = vars(importlib.import_module(f'neuralsolver.{module}'))
        found |= {name: value for name, value in public.items() if name[0] != '_'}
    own = {name: getattr(tools, name) for name in dir(tools) if name[0] != '_' and name != 'net'}
    return globals() | found | own | dict(net=tools.net)


OURS = str(Path(ns.__file__).parent)


def verdict(error: BaseException) -> str:
    "Is an error one clear line of ours?"
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames and frames[-1].filename.startswith(OURS)
    line = str(error)
    kinds = (ValueError, TypeError, OSError, ImportError)
    clicks = type(error).__name__ == 'ParameterError'
    sentence = 8 <= len(line) <= 2000 and '\n' not in line
    if isinstance(error, (kinds, ImportError)) or clicks:
        return 'clear line' if ours and sentence else f'unclear: {type(error).__name__}'
    return f'unclear: {type(error).__name__}'


class OutOfTime(BaseException):
    "A case took too long."


@contextlib.contextmanager
def bounded(seconds: float, gib: float):
    "End what takes longer or more memory (POSIX)."
    import resource
    import signal

    def stop(*_):
        raise OutOfTime

    old = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * 4096
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (size + int(gib * 2**30), limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(line: str, names: dict, tools: Tools, seconds: float = 10.0) -> str:
    "What comes back from a line: 'right', 'clear line', or what is wrong with it."
    want, code = line[0], line[2:]
    before = sorted(tools.outside.rglob('*'))
    try:
        with bounded(seconds, 2.0), warnings.catch_warnings(action='ignore'):
            with contextlib.redirect_stderr(io.StringIO()):
                value = eval(code, names)
        found = 'right' if want in 'RB' and bool(value) else 'accepted' if want == 'E' else 'wrong'
    except OutOfTime:
        found = 'hang'
    except MemoryError:
        found = 'memory'
    except Exception as e:
        found = verdict(e)
        if 'allocate' in str(e):
            found = 'memory'
        if want == 'R':
            found = f'refused: {type(e).__name__} {str(e)[:60]}'
        names['error'] = e
    if sorted(tools.outside.rglob('*')) != before:
        found = 'file outside'
        for file in set(tools.outside.rglob('*')) - set(before):
            file.unlink()
    return found


GOOD = ('right', 'clear line')


@contextlib.contextmanager
def workplace():
    "A folder, a home, and the names of the lines."
    here, home = os.getcwd(), os.environ.get('HOME')
    with tempfile.TemporaryDirectory() as d:
        tools = Tools(Path(d))
        os.chdir(tools.folder)
        os.environ['HOME'] = str(tools.home)
        try:
            yield tools, names_of(tools)
        finally:
            os.chdir(here)
            os.environ['HOME'] = home


def lines_of(kind: str) -> list[str]:
    return [line for line in CASES[kind].splitlines() if line]


def main():
    "Count by kind, and print what fails."
    total = collections.Counter()
    for kind in sys.argv[1:] or CASES:
        with workplace() as (tools, names):
            found = {}
            for line in lines_of(kind):
                begun = time.perf_counter()
                found[line] = outcome(line, names, tools)
                if found[line] not in GOOD or time.perf_counter() - begun > 2:
                    took = time.perf_counter() - begun
                    said = str(names.get('error', ''))[:110].replace('\n', '|')
                    print(f'{found[line]:28} {took:5.1f} s  {line:70} {said}', flush=True)
                names.pop('error', None)
        good = sum(f in GOOD for f in found.values())
        total['good'] += good
        total['all'] += len(found)
        print(f'== {kind}: {good} of {len(found)}', flush=True)
    print(f'== all: {total["good"]} of {total["all"]}')


if __name__ == '__main__':
    main()
