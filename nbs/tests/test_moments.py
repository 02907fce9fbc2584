"""Mean and covariance: numpy's, whatever the pieces the rows come in, also after a pause."""

import numpy as np
import pytest
import torch

from neuralsolver.metrics import Moments, moments


@pytest.mark.parametrize('shift', [0, 1e4])
def test_moments_are_numpys_however_the_rows_come(shift):
    g = torch.Generator().manual_seed(1)
    rows = shift + torch.randn(2345, 7, generator=g, dtype=torch.float64)
    want = np.cov(rows.numpy().T)
    for size in (1, 10, 999, 2345):
        m = Moments(7)
        for part in rows.split(size):
            m.add(part)
        mean, covariance = m.result()
        assert np.allclose(mean, rows.mean(0), rtol=1e-13)
        assert np.allclose(covariance, want, atol=1e-10)


@pytest.mark.parametrize('dim', [5, 2023])
def test_moments_do_not_depend_on_the_pieces_nor_on_a_pause(dim, tmp_path):
    rows = torch.randn(2345, dim, generator=torch.Generator().manual_seed(2))
    want = moments(rows)
    for size in (53, 999, 1000, 2345):
        m = Moments(dim)
        for k, part in enumerate(rows.split(size)):
            m.add(part)
            if k == 20 or size == 999:
                torch.save(m.state_dict(), tmp_path / 'm')
                m = Moments(dim).load_state_dict(torch.load(tmp_path / 'm', weights_only=True))
        assert all(map(torch.equal, m.result(), want)) and len(m) == 2345
    first, second = Moments(dim).add(rows[:1234]), Moments(dim).add(rows[1234:])
    first.merge(second)
    first.merge(Moments(dim))
    assert all(map(torch.allclose, first.result(), want)) and len(first) == 2345
    assert all(map(torch.equal, first.result(), first.result()))  # asking changes nothing


def test_moments_refuse_what_has_none():
    with pytest.raises(ValueError, match='samples=7'):
        moments(torch.zeros(7, 3))
    with pytest.raises(ValueError, match='not finite'):
        moments(torch.full((9, 3), float('nan')))
    with pytest.raises(ValueError, match=r'give \[m, 3\]'):
        Moments(3).add(torch.zeros(3))
    with pytest.raises(ValueError, match='block='):
        moments(torch.zeros(9, 3), 0)
    rows = torch.ones(4, 2, dtype=torch.float64)
    m = Moments(2).add(rows)
    rows += 1  # a buffer that is used again
    assert m.add(rows).result()[0].tolist() == [1.5, 1.5]
