//! The harness: starts the real stack, private PostgreSQL, control planes, Envoys with the filter and a demo API, on free
//! ports, talks to it as clients do, and stops it when it is dropped, so also when a test panics. `cargo xtask up` starts
//! the same stack on fixed ports.
//!
//! Waiting is always for something that can be observed, with a deadline: see [`wait`].

#![deny(unsafe_code)]

pub mod paths;
pub mod ports;
pub mod wait;

pub mod log;
pub mod process;
pub mod reap;

pub mod tools;

pub mod containers;
pub mod control_plane;
pub mod demo;
pub mod envoy;
pub mod envoy_config;
pub mod policies;
pub mod postgres;
pub mod scripted;
pub mod service;
pub mod shell;

pub mod bench;
pub mod stack;

pub mod expect;
pub mod flood;
pub mod http;
pub mod load;
pub mod raw;
pub mod raw_http2;
pub mod rest;

pub mod certificates;
pub mod tls;
pub mod torture;
