"""Disposable Linux machines over SSH."""
