//! Keys: created, read, changed, rotated, revoked and imported.

pub mod effective;
pub mod model;
pub mod permissions;

pub mod lock;
pub mod read;

pub mod create;
pub mod import;
pub mod revoke;
pub mod rotate;
pub mod unknown;
pub mod update;

pub mod daily_limit;
pub mod pepper;
pub mod purge;
