"""Interoperate with Flower: conversion of models to its records, and adapters for its apps and strategies.

The transport between coordinator and nodes is in `fedlearn.protocol`.
"""
