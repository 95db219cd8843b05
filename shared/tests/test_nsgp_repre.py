"""Null-space projection (NSGP-RePRE): the authors' covariances, masks and steps, and the properties of a projector."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from proto_core.optim import (
    NullSpaceProjection,
    NullSpaceSGD,
    input_covariance,
    null_space_mask,
    null_space_projector,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "nsgp_repre.npz")


def near(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_covariances_equal_the_authors_code(golden):
    images, vectors = (torch.from_numpy(golden[f"cov_{name}"]) for name in ("images", "vectors"))
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(
                images.shape[2], 4, 3, stride=int(golden["cov_stride"]), padding=int(golden["cov_padding"])
            ),
            "fc": nn.Linear(5, 3),
        }
    ).double()
    projection = NullSpaceProjection()
    with projection.collect(net, ["conv", "fc"]):
        for x, v in zip(images, vectors):
            net["conv"](x)
            net["fc"](v)
    near(projection.covariances["conv.weight"], golden["cov_conv"])
    near(projection.covariances["fc.weight"], golden["cov_fc"])
    net["fc"](vectors[0])
    near(projection.covariances["fc.weight"], golden["cov_fc"])


@pytest.mark.parametrize("case", range(5))
def test_masks_equal_the_authors_code(golden, case):
    found = null_space_mask(torch.from_numpy(golden[f"thr{case}_values"]), float(golden[f"thr{case}_offset"]))
    near(found.long(), golden[f"thr{case}_mask"])


@pytest.mark.parametrize("case", [0, 1])
def test_steps_equal_the_authors_code(golden, case):
    shapes = {"backbone.conv.weight": "conv", "backbone.conv.bias": "bias", "neck.fc.weight": "fc"}
    projection = NullSpaceProjection(normalize=lambda name: name.startswith("backbone"))
    projection.covariances = {
        "backbone.conv.weight": torch.from_numpy(golden["opt_cov_conv"]),
        "neck.fc.weight": torch.from_numpy(golden["opt_cov_fc"]),
    }
    projection.fit()
    near(projection.projectors["backbone.conv.weight"], golden["opt_P_conv"], 1e-7)
    near(projection.projectors["neck.fc.weight"], golden["opt_P_fc"], 1e-7)
    parameters = {name: nn.Parameter(torch.from_numpy(golden[f"opt_{short}"].copy())) for name, short in shapes.items()}
    optimizer = NullSpaceSGD(
        parameters.items(),
        lr=0.1,
        momentum=float(golden[f"opt{case}_momentum"]),
        weight_decay=float(golden[f"opt{case}_weight_decay"]),
        nesterov=bool(golden[f"opt{case}_nesterov"]),
        projection=projection,
    )
    for step in range(3):
        for name, short in shapes.items():
            parameters[name].grad = torch.from_numpy(golden[f"opt{case}_grads_{short}"][step].copy())
        optimizer.step()
    for name, short in shapes.items():
        near(parameters[name], golden[f"opt{case}_final_{short}"], 1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0}, {"nesterov": True}, {"weight_decay": 0.1, "dampening": 0.2}]
)
def test_without_projection_it_is_sgd(options):
    torch.manual_seed(0)
    one = nn.Linear(4, 3)
    two = nn.Linear(4, 3)
    two.load_state_dict(one.state_dict())
    ours = NullSpaceSGD(one.named_parameters(), lr=0.1, **options)
    peer = torch.optim.SGD(two.parameters(), lr=0.1, **{"momentum": 0.9, **options})
    for _ in range(4):
        x = torch.randn(8, 4)
        for net, optimizer in ((one, ours), (two, peer)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(one.weight, two.weight)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(1, 4), st.integers(0, 1000))
def test_projector_is_one(width, rank, seed):
    rows = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projector = null_space_projector(rows.T @ rows)
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector, projector.T)
    assert 1 <= round(projector.trace().item()) <= width
    scaled = null_space_projector(1e6 * rows.T @ rows)
    torch.testing.assert_close(scaled, projector, rtol=1e-6, atol=1e-6)


def test_output_on_old_inputs_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 6)).double()
    old = torch.randn(3, 20, dtype=torch.float64) * 100
    projection = NullSpaceProjection(offset=1.5)  # leave the bend itself out
    with projection.collect(net, ["0"]):
        for row in old:
            net(row)
    projection.fit()
    before, start = net(old), net[0].weight.detach().clone()
    bias = net[0].bias.requires_grad_(False)
    optimizer = NullSpaceSGD([("0.weight", net[0].weight)], lr=0.1, projection=projection)
    for _ in range(5):
        optimizer.zero_grad()
        (net(torch.randn(8, 20, dtype=torch.float64)) - 3).square().mean().backward()
        optimizer.step()
    assert bias.grad is None
    torch.testing.assert_close(net(old), before, rtol=1e-6, atol=1e-6)
    assert (net[0].weight - start).norm() > 0.1


def test_two_tasks_add_up_and_state_is_kept(tmp_path):
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    projection = NullSpaceProjection(normalize=True)
    for _ in range(2):
        with projection.collect(net, ["0", "2"]):
            net(torch.ones(3, 4))
    near(projection.covariances["0.weight"], 2 * np.ones((4, 4)))
    projection.fit()
    near(projection.projectors["0.weight"].norm(), 1.0, 1e-6)
    torch.save(projection.state_dict(), tmp_path / "p.pt")
    other = NullSpaceProjection()
    other.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    update = torch.randn(2, 4)
    assert torch.equal(other.project("0.weight", update), projection.project("0.weight", update))
    assert other.project("unknown", update) is update


def test_convolution_covariance_follows_its_padding():
    x = torch.randn(2, 3, 6, 7)
    for conv in (
        nn.Conv2d(3, 4, 3, padding="same", dilation=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", stride=2),
        nn.Conv2d(3, 4, (1, 3)),
    ):
        cov = input_covariance(conv, x)
        out = conv(x.mean(0, keepdim=True)) - (conv.bias[:, None, None])
        weight = conv.weight.flatten(1)
        torch.testing.assert_close(
            weight @ cov @ weight.T, out[0].flatten(1) @ out[0].flatten(1).T, rtol=1e-4, atol=1e-4
        )


def test_few_and_equal_values():
    assert null_space_mask(torch.tensor([3.0, 1.0])).tolist() == [True, True]
    assert null_space_mask(torch.ones(5)).tolist() == [False, False, False, False, True]
    assert null_space_mask(torch.tensor([5.0, 4.0, 0.1, 0.0]), offset=-9.0).all()
    assert null_space_mask(torch.tensor([5.0, 4.0, 0.1, 0.0]), offset=9.0).tolist() == [False] * 3 + [True]


LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: input_covariance(nn.ReLU(), torch.ones(2, 2)), "module: found ReLU"),
        (lambda: input_covariance(LINEAR, torch.ones(2, 3)), r"x: found shape \(2, 3\)"),
        (lambda: input_covariance(LINEAR, torch.ones(0, 2)), "needed one sample"),
        (lambda: input_covariance(nn.Conv2d(4, 4, 3, groups=2), torch.ones(1, 4, 5, 5)), "of 2 groups"),
        (lambda: null_space_mask(torch.tensor([1.0, 2.0, 3.0])), "found values that rise"),
        (lambda: null_space_mask(torch.tensor([torch.nan, 2.0, 3.0])), "found NaN"),
        (lambda: null_space_projector(torch.ones(2, 3)), "cov: found shape"),
        (lambda: null_space_projector(torch.full((2, 2), torch.nan)), "cov: found 4 NaN"),
        (lambda: NullSpaceProjection().collect(LINEAR, ["a"]).__enter__(), "no such module"),
        (lambda: NullSpaceProjection().collect(nn.Sequential(nn.ReLU()), ["0"]).__enter__(), "found '0' .ReLU."),
        (lambda: NullSpaceSGD([], lr=0.1), "named_parameters: found none"),
        (lambda: NullSpaceSGD(LINEAR.named_parameters(), lr=-0.1), "lr: found -0.1"),
        (lambda: NullSpaceSGD(LINEAR.named_parameters(), lr=0.1, momentum=0, nesterov=True), "nesterov: found"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_an_update_of_another_width_and_names_the_covariance():
    projection = NullSpaceProjection()
    projection.covariances["a.weight"] = torch.eye(3)
    projection.fit()
    with pytest.raises(ValueError, match=r"a\.weight: found an update of width 4, needed 3"):
        projection.project("a.weight", torch.ones(2, 4))
    projection.covariances["a.weight"] = torch.full((3, 3), torch.nan)
    with pytest.raises(ValueError, match=r"a\.weight: cov: found 9 NaN"):
        projection.fit()
