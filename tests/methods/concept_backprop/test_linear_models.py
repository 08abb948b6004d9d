"""Linear models against scikit-learn, and against the conditions of their optimum."""

import numpy as np
import pytest
import torch

from lightning_bpfree.methods.concept_backprop.linear_models import least_squares, logistic


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    noise = torch.randn(300, generator=generator, dtype=torch.float64)
    return x, x[:, 0] - 0.5 * x[:, 1] + 0.3 * noise


@pytest.mark.parametrize("l1", [False, True])
def test_logistic_is_scikit_learns(data, l1):
    from sklearn.linear_model import LogisticRegression

    x, line = data
    targets = torch.stack([line > 0, x[:, 2] > 0.3], 1).double()
    found = logistic(x, targets, 0.02, torch.ones_like(targets), l1)
    for column in (0, 1):
        settings = {"l1_ratio": 1.0, "solver": "saga"} if l1 else {"solver": "lbfgs"}
        peer = LogisticRegression(C=1 / (300 * 0.02), tol=1e-10, max_iter=100_000, **settings)
        peer.fit(x.numpy(), targets[:, column].numpy())
        # both solvers stop at gradients of 1e-7 and less; the curvature is at least the penalty's 0.02
        np.testing.assert_allclose(found.weight[:, column].numpy(), peer.coef_[0], atol=2e-5)
        np.testing.assert_allclose(float(found.bias[column]), peer.intercept_[0], atol=2e-5)


def test_lasso_and_ridge_are_scikit_learns(data):
    from sklearn.linear_model import Lasso, Ridge

    x, line = data
    for l1 in (False, True):
        found = least_squares(x, line[:, None] + 3, 0.05, l1)
        # scikit-learn's ridge sums the squared errors
        peer = Lasso(alpha=0.05, tol=1e-12) if l1 else Ridge(alpha=300 * 0.05, tol=1e-12)
        peer.fit(x.numpy(), line.numpy() + 3)
        np.testing.assert_allclose(found.weight[:, 0].numpy(), peer.coef_, atol=1e-6)  # where the proximal steps stop
        np.testing.assert_allclose(float(found.bias[0]), peer.intercept_, atol=1e-6)


def test_more_features_than_samples_give_the_same_ridge(data):
    x, line = data
    few, wanted = x[:8], line[:8, None]
    eye = torch.eye(12, dtype=torch.float64)
    centered = few - few.mean(0)
    expected = torch.linalg.solve(centered.T @ centered / 8 + 0.1 * eye, centered.T @ (wanted - wanted.mean()) / 8)
    torch.testing.assert_close(least_squares(few, wanted, 0.1).weight, expected, rtol=1e-10, atol=1e-12)
