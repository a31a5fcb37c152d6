//! A buffer of another peer: found among the offers, attached, followed from change to change.
//!
//! It does not know what is in it. When the exporter wants it back, or goes away, following ends.

use std::str::FromStr;

use bufshare::host::image::Image;
use bufshare::ioctl::Mapping;
use uuid::Uuid;

use crate::device::{Attached, Device, Error, map_for};
use crate::{Failure, line, mode_name, uapi};

/// Which buffer.
#[derive(Debug, Clone)]
pub enum Wanted {
    Uuid(Uuid),
    Name(String),
}

impl FromStr for Wanted {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.parse() {
            Ok(uuid) => Wanted::Uuid(uuid),
            Err(_) => Wanted::Name(text.to_owned()),
        })
    }
}

/// On what terms it is attached.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// `uapi::ACCESS_*`.
    pub access: u32,
    pub zero_copy: bool,
    /// Only what this peer exports.
    pub from: Option<u32>,
}

/// What is new about a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Changed,
    /// The exporter wants it back: let go.
    Withdrawn,
    /// It is gone.
    Revoked,
}

/// `None` where the exporter is gone, or the device of this guest.
fn unless_gone<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if [libc::EOWNERDEAD, libc::ENODEV].contains(&error.errno()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An attached buffer.
#[derive(Debug)]
pub struct Followed<'a> {
    device: &'a Device,
    pub buffer: Attached,
    pub mapping: Mapping,
}

impl<'a> Followed<'a> {
    /// Waits until the buffer is offered, and attaches it. Only who attached a buffer knows its name:
    /// a buffer of another name is let go again.
    pub fn find(device: &'a Device, wanted: &Wanted, terms: Terms) -> Result<Self, Failure> {
        let mut tried = std::collections::BTreeSet::new();
        loop {
            let mut id = 0;
            while let Some(offer) = device.offer(id)? {
                id = offer.id;
                let uuid = Uuid::from_bytes(offer.uuid);
                let other = matches!(wanted, Wanted::Uuid(wanted) if *wanted != uuid)
                    || terms.from.is_some_and(|peer| peer != offer.peer_id);
                if other || !tried.insert(uuid) {
                    continue;
                }
                let buffer = match device.attach(uuid, terms.access, terms.zero_copy) {
                    Ok(buffer) => buffer,
                    // It went meanwhile.
                    Err(error) if [libc::ENOENT, libc::EOWNERDEAD].contains(&error.errno()) => {
                        tried.remove(&uuid);
                        continue;
                    }
                    // Perhaps it is not the one that is wanted, to be had on other terms.
                    Err(error) if error.errno() == libc::EACCES => {
                        let other = device.attach(uuid, offer.access, false);
                        match (wanted, other) {
                            (Wanted::Name(name), Ok(other)) if *name != other.name => continue,
                            _ => return Err(error.into()),
                        }
                    }
                    Err(error) => return Err(error.into()),
                };
                if !matches!(wanted, Wanted::Name(name) if *name != buffer.name) {
                    return Followed::new(device, buffer, terms);
                }
            }
            while device.event(None)?.is_some_and(|event| {
                event.kind != uapi::EVENT_OFFERED && event.kind != uapi::EVENT_RESYNC
            }) {}
        }
    }

    fn new(device: &'a Device, buffer: Attached, terms: Terms) -> Result<Self, Failure> {
        let mapping = map_for(&buffer.fd, buffer.size, terms.access & uapi::ACCESS_WRITE != 0)?;
        line(&format!(
            "attached handle={} uuid={} name={:?} mode={} size={} exporter={} generation={}",
            buffer.handle,
            buffer.uuid,
            buffer.name,
            mode_name(buffer.mode),
            buffer.size,
            buffer.exporter,
            buffer.generation
        ))?;
        Ok(Followed { device, buffer, mapping })
    }

    /// Waits for the next news about this buffer.
    pub fn next(&self) -> Result<News, Failure> {
        loop {
            let Some(event) = unless_gone(self.device.event(None))? else {
                return Ok(News::Revoked);
            };
            let Some(event) = event else { continue };
            let ours = event.handle == self.buffer.handle;
            match event.kind {
                uapi::EVENT_CHANGED if ours => return Ok(News::Changed),
                uapi::EVENT_REVOKED if ours => return Ok(News::Revoked),
                uapi::EVENT_WITHDRAWN if event.uuid == self.buffer.uuid.into_bytes() => {
                    return Ok(News::Withdrawn);
                }
                _ => {}
            }
        }
    }

    /// Reads from the start of the buffer, inside a bracket: the generation that it was of, `None` where the
    /// buffer is gone.
    pub fn read(&self, bytes: &mut [u8]) -> Result<Option<u64>, Failure> {
        let sync = |flags| {
            let generation = self.device.sync(self.buffer.handle, uapi::SYNC_F_READ | flags);
            unless_gone(generation)
        };
        let Some(generation) = sync(0)? else { return Ok(None) };
        let what = || "reading the buffer".to_owned();
        let read = self.mapping.read_at(0, bytes);
        read.map_err(|source| Failure::Io { what: what(), source })?;
        Ok(sync(uapi::SYNC_F_END)?.map(|_| generation))
    }

    /// The picture that the metadata describe; none where it is not one that can be read pixel by pixel.
    pub fn image(&self) -> Result<Image, Failure> {
        let buffer = &self.buffer;
        let image = Image::parse(buffer.metadata_type, &buffer.metadata, buffer.size);
        image.map_err(|source| Failure::Image { name: buffer.name.clone(), source })
    }
}
