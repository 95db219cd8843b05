"""ProtoECGNet: shapes and sizes from arguments, frozen branches, stages, storage, explanations, projection."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_core.training import enter_stage, save_checkpoint
from proto_ecg.data.module import ECGBatch
from proto_ecg.protoecgnet import (
    PTBXL_ALL,
    PTBXL_DIFFUSE,
    PTBXL_MORPHOLOGY,
    PTBXL_RHYTHM,
    Branch1d,
    Branch2d,
    LossWeights,
    ProtoECGBranch1d,
    ProtoECGBranch2d,
    ProtoECGNet,
    Schedule,
    project_global,
    project_windows,
    window_similarity,
)
from proto_ecg.protoecgnet.backbones import ResNet1d, ResNet2d, feature_length

LABELS = ["SR", "AFIB", "PVC", "LVH", "INVT", "NORM", "DIG"]
SMALL_1D = {"proto_dim": 16, "backbone": "resnet1d10_narrow"}
SMALL_2D = {"proto_dim": 16, "backbone": "resnet10_narrow"}


def small(labels=LABELS, **options):
    torch.manual_seed(0)
    return ProtoECGNet(
        Branch1d(2, **SMALL_1D),
        Branch2d(2, **SMALL_2D, window=3),
        Branch2d(2, **SMALL_2D, window=None),
        label_names=labels,
        **options,
    )


def batch(n=6, labels=7, length=1000):
    g = torch.Generator().manual_seed(1)
    targets = (torch.rand(n, labels, generator=g) < 0.4).float()
    return ECGBatch(torch.randn(n, 12, length, generator=g), targets, torch.arange(n))


@pytest.fixture(scope="module")
def golden(golden_dir):
    return {key: torch.as_tensor(value) for key, value in np.load(golden_dir / "protoecgnet.npz").items()}


def test_projection_functions_equal_authors(golden):
    projected, index = project_global(
        *(golden[f"proj1d_{name}"] for name in ("features", "targets", "prototypes", "prototype_class"))
    )
    torch.testing.assert_close(projected, golden["proj1d_projected"])
    assert torch.equal(index, golden["proj1d_sample_index"])
    projected, index, window = project_windows(
        *(golden[f"proj2d_{name}"] for name in ("features", "targets", "prototypes", "prototype_class"))
    )
    torch.testing.assert_close(projected, golden["proj2d_projected"])
    assert torch.equal(index, golden["proj2d_sample_index"])
    assert torch.equal(window, golden["proj2d_window_index"])


def test_label_groups_are_the_papers():
    assert [len(group) for group in (PTBXL_RHYTHM, PTBXL_MORPHOLOGY, PTBXL_DIFFUSE, PTBXL_ALL)] == [16, 52, 3, 71]
    assert sorted(PTBXL_RHYTHM + PTBXL_MORPHOLOGY + PTBXL_DIFFUSE) == sorted(PTBXL_ALL)
    for group in (PTBXL_RHYTHM, PTBXL_MORPHOLOGY, PTBXL_DIFFUSE):
        places = [PTBXL_ALL.index(code) for code in group]
        assert places == sorted(places)


def test_paper_sizes():
    net = ProtoECGNet(Branch1d(5), Branch2d(18, window=3), Branch2d(7, window=None), label_names=PTBXL_ALL)
    assert [net.branch(name).layer.num_prototypes for name in net.branch_names] == [80, 936, 21]
    assert tuple(net.morphology.prototypes.shape) == (936, 512, 1, 3)
    assert tuple(net.diffuse.prototypes.shape) == (21, 512, 1, 32)
    assert net.classifier.weight.shape == (71, 1037)
    assert net.classifier.bias is not None
    assert net.rhythm.classifier.bias is None


@pytest.mark.parametrize(("length", "steps"), [(1000, 32), (5000, 157), (500, 16), (1, 1)])
def test_feature_length_is_what_the_backbones_make(length, steps):
    assert feature_length(length) == steps
    assert ResNet2d("resnet10_narrow").eval()(torch.randn(1, 1, 12, length)).shape == (1, 128, 1, steps)


def test_row_convolution_equals_the_whole_kernel():
    """torchvision's own ResNet-18, stem replaced as the card says, gives the same map; its 3x3 weights load."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    ours, theirs = ResNet2d("resnet18").eval(), resnet18()
    theirs.conv1 = torch.nn.Conv2d(1, 64, (12, 7), (1, 2), (0, 3), bias=False)
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    theirs.avgpool, theirs.fc = torch.nn.Identity(), torch.nn.Identity()
    theirs.eval()
    x = torch.randn(2, 1, 12, 1000)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).flatten(1), theirs(x), rtol=1e-4, atol=1e-5)


def test_2d_backbone_names_another_number_of_leads():
    with pytest.raises(ValueError, match=r"found shape \(1, 1, 8, 100\), needed \[N, 1, 12, L\]"):
        ResNet2d("resnet10_narrow")(torch.randn(1, 1, 8, 100))


def test_1d_backbone_shape_and_unknown_name():
    assert ResNet1d("resnet1d18")(torch.randn(2, 12, 1000)).shape == (2, 512)
    with pytest.raises(ValueError, match="needed one of"):
        ResNet1d("resnet1d99")


def test_card_constructor_and_frozen_branches():
    net = ProtoECGNet(
        ProtoECGBranch1d(2, 2, **SMALL_1D),
        ProtoECGBranch2d(3, 2, window=3, **SMALL_2D),
        ProtoECGBranch2d(2, 1, window=32, **SMALL_2D),
        num_classes=7,
    )
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    net.train()
    assert net.training
    assert not any(m.training for name in net.branch_names for m in net.branch(name).modules())
    before = copy.deepcopy(net.morphology.state_dict())
    out = net(torch.randn(3, 1, 12, 1000))
    assert out.logits.shape == (3, 7)
    assert out.similarities.shape == (3, 4 + 6 + 2)
    after = net.morphology.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_logits_are_sums_over_prototypes_in_branch_order():
    net = small().eval()
    x = batch().signal.unsqueeze(1)
    with torch.no_grad():
        out = net(x)
        parts = [net.rhythm(x[:, 0]), net.morphology(x), net.diffuse(x)]
    torch.testing.assert_close(out.similarities, torch.cat([part.similarities for part in parts], 1))
    torch.testing.assert_close(out.logits, out.similarities @ net.classifier.weight.T + net.classifier.bias)
    own = net.rhythm.class_identity.T
    torch.testing.assert_close(net.rhythm.classifier.weight, torch.where(own == 1, 1.0, -0.5))


def test_every_stage_trains_exactly_its_part():
    net = small(schedule=Schedule(pretrain_epochs=1, rounds=2))
    names = [stage.name for stage in net.stages]
    assert names[:5] == ["rhythm.pretrain", "rhythm.joint", "rhythm.joint2", "rhythm.classifier", "morphology.pretrain"]
    assert names[-1] == "fusion"
    for stage in net.stages:
        enter_stage(net, stage)
        net.train()
        net.zero_grad()
        net.training_step(batch(), 0).backward()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (stage.name, name)
                assert parameter.grad.isfinite().all(), (stage.name, name)
            else:
                assert parameter.grad is None, (stage.name, name)
    assert all(stage.project == ("joint" in stage.name) for stage in net.stages)


def test_training_targets_give_cooccurrence_and_weights_per_branch():
    net = small()
    targets = batch(50).targets
    targets[:, 6] = 0
    net.use_training_targets(targets)
    own = targets[:, [0, 1]]
    both, either = (own.sum(1) == 2).sum(), (own.sum(1) > 0).sum()
    assert net.rhythm_cooccurrence[0, 1].item() == pytest.approx((both / either).item(), rel=1e-6)
    counts = own.sum(0)
    torch.testing.assert_close(net.rhythm_pos_weight, (counts.sum() - counts) / counts)
    assert net.diffuse_pos_weight[1] == 1
    plain = small(loss=LossWeights(pos_weight=False))
    plain.use_training_targets(targets)
    assert plain.rhythm_pos_weight.tolist() == [1, 1]


def test_label_sets_of_any_kind():
    assert small(["SR", "AFIB"]).branch_names == ["rhythm"]
    everything = small(["my label", "other"])
    assert everything.branch_names == ["rhythm", "morphology", "diffuse"]
    assert everything(batch(2, 2).signal.unsqueeze(1)).logits.shape == (2, 2)
    long = small(num_samples=5000, sampling_rate=500)
    assert long.diffuse.prototypes.shape[-1] == 157
    assert long(torch.randn(1, 1, 12, 5000)).logits.shape == (1, 7)


def test_checkpoint_and_pretrained_give_the_same_logits(tmp_path):
    net = small()
    net.morphology.layer.assign_cases(
        torch.randn_like(net.morphology.prototypes), torch.arange(6), torch.arange(6), lambda i: (f"r{i}", ["PVC"])
    )
    net.thresholds.fill_(0.3)
    net.eval()
    x = batch(3).signal.unsqueeze(1)
    save_checkpoint(net, tmp_path / "a.ckpt")
    net.save_pretrained(tmp_path / "pretrained")
    with torch.no_grad():
        expected = net(x).logits
        for again in (
            ProtoECGNet.from_checkpoint(tmp_path / "a.ckpt"),
            ProtoECGNet.from_pretrained(tmp_path / "pretrained"),
        ):
            assert torch.equal(again(x).logits, expected)
            assert again.morphology.layer.case_ids == net.morphology.layer.case_ids
            assert again.thresholds.tolist() == net.thresholds.tolist()
            assert again.label_names == net.label_names


def test_pretrained_folder_that_is_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        ProtoECGNet.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"system": "other"}))
    with pytest.raises(ValueError, match="holds system 'other'"):
        ProtoECGNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cut or corrupt"):
        ProtoECGNet.from_pretrained(tmp_path)


def test_checkpoint_of_another_label_set_is_refused():
    checkpoint = {}
    small().on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"another label set.*lacks \['CRBBB'\].*adds \['DIG'\]"):
        small([*LABELS[:-1], "CRBBB"]).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="order differs"):
        small(LABELS[::-1]).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="num_samples"):
        small(num_samples=2000).on_load_checkpoint(checkpoint)


def test_explanations_add_up_and_point_at_the_window():
    net = small().eval()
    net.morphology.layer.assign_cases(
        net.morphology.prototypes.detach(), torch.arange(6), torch.full((6,), 7), lambda i: (f"r{i}", ["PVC"])
    )
    signals = batch(3).signal
    with torch.no_grad():
        logits = net(signals.unsqueeze(1)).logits
        features = net.morphology.features(signals.unsqueeze(1))
        best = window_similarity(features, net.morphology.prototypes).argmax(-1)
    for n, explanations in enumerate(net.explain(signals, ["a", "b", "c"], LABELS)):
        assert [e.label for e in explanations] == sorted(LABELS, key=lambda c: -float(logits[n, LABELS.index(c)]))
        for explanation in explanations:
            c = LABELS.index(explanation.label)
            assert explanation.logit == pytest.approx(float(logits[n, c]), abs=1e-5)
            assert explanation.total == pytest.approx(explanation.logit, abs=1e-5)
            assert sorted(e.prototype for e in explanation.evidence) == list(range(len(net.prototype_names())))
            for evidence in explanation.evidence:
                if evidence.group != "morphology":
                    assert evidence.location is None
                    assert evidence.case is None
                    continue
                place = int(best[n, evidence.prototype - net.rhythm.layer.num_prototypes])
                assert evidence.location == ((int(place * 1000 / 32), 93),)
                assert evidence.case.location == ((int(7 * 1000 / 32), 93),)
                assert evidence.case.labels == ("PVC",)


def test_explain_predicts_at_the_thresholds_or_the_most_probable():
    net = small()
    net.thresholds.fill_(1.1)
    (one,) = net.explain(batch(1).signal, ["a"])
    assert len(one) == 1
    assert not one[0].predicted
    net.thresholds.fill_(0.0)
    (all_,) = net.explain(batch(1).signal, ["a"])
    assert len(all_) == 7


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)))
def test_records_do_not_see_each_other(order):
    net = small().eval()
    x = batch(5).signal.unsqueeze(1)
    with torch.no_grad():
        torch.testing.assert_close(net(x[list(order)]).logits, net(x).logits[list(order)], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains():
    net = small()
    enter_stage(net, net.stages[0])
    net.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net.training_step(batch(), 0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.bad_input
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="longer than the record"):
        ProtoECGNet(None, Branch2d(1, **SMALL_2D, window=40), None, label_names=["PVC"])
    with pytest.raises(ValueError, match="at least one branch"):
        ProtoECGNet(None, None, None, label_names=["PVC"])
    with pytest.raises(ValueError, match="no name twice"):
        small(["PVC", "PVC"])
    with pytest.raises(ValueError, match="the branch has 3 classes"):
        ProtoECGNet(ProtoECGBranch1d(3, 1, **SMALL_1D), None, None, label_names=["SR", "AFIB"])
    with pytest.raises(ValueError, match="not among the label names"):
        small(branch_labels={"rhythm": ["SR", "STACH"]})
    with pytest.raises(ValueError, match="needed some of"):
        small(branch_labels={"morphologie": ["SR"]})
    with pytest.raises(ValueError, match="add_on"):
        ProtoECGBranch1d(2, add_on="sigmoid")
    with pytest.raises(ValueError, match="identity"):
        ProtoECGBranch1d(2, proto_dim=3, backbone="resnet1d10_narrow", add_on="identity")
    with pytest.raises(ValueError, match="no published weights"):
        ProtoECGBranch2d(2, 1, backbone="resnet10_narrow", pretrained=True)
    net = small()
    with pytest.raises(ValueError, match="needed \\[N, 1, leads, L\\]"):
        net(torch.randn(2, 12, 1000))
    with pytest.raises(ValueError, match="needed \\[N, 7\\]"):
        net.use_training_targets(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="does not know"):
        net.explain(batch(1).signal, ["a"], ["XYZ"])
    with pytest.raises(ValueError, match="names for"):
        net.explain(batch(2).signal, ["a"])
    with pytest.raises(ValueError, match="rounds"):
        small(schedule=Schedule(rounds=0))


def test_no_record_gives_no_row():
    for branch, shape in [
        (ProtoECGBranch1d(2, 1, proto_dim=8, backbone="resnet1d10_narrow"), (0, 12, 320)),
        (ProtoECGBranch2d(2, 1, proto_dim=8, backbone="resnet10_narrow"), (0, 1, 12, 320)),
    ]:
        logits, similarities = branch.eval()(torch.zeros(shape))
        assert (logits.shape, similarities.shape) == ((0, 2), (0, 2))


def test_branches_without_add_on_have_stages_that_train_what_there_is():
    net = ProtoECGNet(
        Branch1d(1, proto_dim=128, backbone="resnet1d10_narrow", add_on="identity"),
        Branch2d(1, proto_dim=16, backbone="resnet10_narrow"),
        None,
        label_names=["SR", "NORM"],
        branch_labels={"rhythm": ["SR"], "morphology": ["NORM"]},
    )
    for stage in net.stages:
        enter_stage(net, stage)
        assert any(parameter.requires_grad for parameter in net.parameters())
    patterns = {stage.name: stage.train for stage in net.stages}
    assert "rhythm.add_on.*" not in patterns["rhythm.joint"]
    assert "morphology.add_on.*" in patterns["morphology.joint"]


def test_a_branch_of_one_label_still_learns_its_positives():
    net = ProtoECGNet(
        Branch1d(1, proto_dim=8, backbone="resnet1d10_narrow"),
        Branch2d(1, proto_dim=8, backbone="resnet10_narrow"),
        None,
        label_names=["AFIB", "NORM", "LVH"],
        branch_labels={"rhythm": ["AFIB"], "morphology": ["NORM", "LVH"]},
        loss=LossWeights(pos_weight=True),
    )
    net.use_training_targets(torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0]]))
    assert net.rhythm_pos_weight.tolist() == [1]
    assert net.morphology_pos_weight.tolist() == [0.5, 2]
    assert net.pos_weight.tolist() == [1.5, 1.5, 4]
