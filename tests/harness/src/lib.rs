//! The stack as processes of this machine: PostgreSQL, control planes, Envoys with the filter and a demo API. `cargo xtask
//! up` starts it on fixed ports, tests on free ones. Everything ends when it is dropped, so also when a test panics.
//!
//! Code that waits, waits for an observable condition with a deadline: see [`wait`].

#![deny(unsafe_code)]

pub mod dice;
pub mod output;
pub mod paths;
pub mod ports;
pub mod wait;

pub mod child_reaper;
pub mod log;
pub mod process;

pub mod cargo;
pub mod compile;
pub mod tools;

pub mod control_plane;
pub mod demo;
pub mod envoy;
pub mod envoy_config;
pub mod postgres;
pub mod service;
pub mod shell;

pub mod flood;
pub mod http;
pub mod rest;

pub mod stack;
