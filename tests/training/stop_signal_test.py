"""Signals that ask a run to stop, and those that do not."""

import signal

import pytest

from sparsek.training.stop_signal import STOP_SIGNALS, StopSignal


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_ask_a_run_to_stop(number):
  before = signal.getsignal(number)
  with StopSignal() as stop:
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested
  assert signal.getsignal(number) == before


def test_a_run_under_nohup_outlives_the_terminal():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.requested
  finally:
    signal.signal(signal.SIGHUP, old)
