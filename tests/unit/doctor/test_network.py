"""Checks of communication with their problems: a taken port, a wrong interface, a host without address, gloo."""

import socket

import pytest

from titan_cpt.doctor import network
from titan_cpt.doctor.request import Request


def test_a_port_that_another_program_uses_is_a_problem(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        (found,) = network.check_port(Request())
    assert found.level == "problem"
    assert "in use" in found.text
    (found,) = network.check_port(Request())
    assert found.level == "ok"


def test_torchruns_own_port_in_use_is_a_note_because_a_run_on_one_node_takes_another(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setattr(network, "_DEFAULT_PORT", other.getsockname()[1])
        (found,) = network.check_port(Request())
    assert found.level == "note"


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_what_is_no_port_is_a_problem(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    (found,) = network.check_port(Request())
    assert "is not a port" in found.text


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("lo", True), ("l", True), ("=lo", True), ("=l", False), ("^docker", True), ("ib0", False), ("ib0,lo", True)],
)
def test_a_variable_that_names_an_interface_must_fit_one(monkeypatch, wanted, fits):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", wanted)
    problems = [each for each in network.check_interfaces(Request()) if "NCCL_SOCKET_IFNAME =" in each.text]
    assert [each.level for each in problems] == ([] if fits else ["problem"])


def test_variables_of_nccl_and_gloo_are_listed(monkeypatch):
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert any("NCCL_IB_DISABLE=1" in each.text for each in network.check_interfaces(Request()))


def test_a_host_without_an_address_is_a_problem(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    (found,) = [each for each in network.check_interfaces(Request()) if each.topic == "host name"]
    assert found.level == "problem"
    assert "/etc/hosts" in found.remedy


def test_an_all_reduce_that_cannot_work_says_why(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (found,) = network.check_all_reduce(Request())
    assert found.level == "problem"
    assert "no-such-interface" in found.text


def test_an_all_reduce_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(network, "_ALL_REDUCE", "import time; time.sleep(600)")
    monkeypatch.setattr(network, "_ALL_REDUCE_TIMEOUT_S", 0.5)
    (found,) = network.check_all_reduce(Request())
    assert "did not end within 0.5 s" in found.text
